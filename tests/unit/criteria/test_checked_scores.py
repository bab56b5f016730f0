"""Scores that rank nothing are an error, wherever they come from, that names the criterion and the layer."""

import pytest
import torch

from hfprune.criteria import ActivationNorm, ActivationTaylor, Magnitude, Random
from hfprune.criteria.base import WeightCriterion, checked_scores
from hfprune.models import find_groups
from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES
from hfprune.plan import Group
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum, weight_scores
from hfprune.sparse.base import InputSums, ScoreMethod
from hfprune.sparse.pattern import Sparsity
from hfprune.utils.errors import CalibrationError
from tests.helpers.models import tiny, token_ids

BAD = {
    "nan": (lambda n: torch.full((n,), float("nan")), "not finite: 24 of 24"),
    "one_nan": (lambda n: torch.arange(n).double().log().sub(1).mul(0).add(torch.arange(n)), "not finite"),
    "infinite": (lambda n: torch.arange(n) / torch.zeros(1), "not finite: 24 of 24"),
    "equal": (lambda n: torch.full((n,), 0.25), "are equal .*0.25"),
    "zero": (torch.zeros, "are zero"),
    "list": (lambda n: [1.0] * n, r"a tensor \[24\] .* returned list"),
    "short": (lambda n: torch.rand(n - 1), r"a tensor \[24\] .* returned \[23\]"),
}


class Own(WeightCriterion):
    def __init__(self, make):
        self.make = make

    def describe(self):
        return {"name": "Own"}

    def score(self, group, weights):
        return self.make(group.num_units)


@pytest.mark.parametrize("kind", BAD)
def test_criteria_of_weights(kind):
    make, match = BAD[kind]
    with pytest.raises(CalibrationError, match=match) as error:
        weight_scores(tiny(), find_groups(tiny()), Own(make))
    assert "Own" in str(error.value)
    assert "model.layers.0.mlp" in str(error.value)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("base", [ActivationNorm, ActivationTaylor])
def test_criteria_of_activations_and_gradients(base, kind):
    make, match = BAD[kind]
    own = type("Mine", (base,), {"score": lambda self, group, sums: make(group.num_units)})
    model, ids = tiny(), token_ids()
    accumulator = ImportanceAccumulator(model, find_groups(model), own())
    with accumulator.recording():
        if base is ActivationNorm:
            accumulator.observe(lambda: model(input_ids=ids), torch.tensor([12, 12]), None)
        else:

            def objective():
                total, valid = objective_sum(model, OBJECTIVES.get("entropy"), {"input_ids": ids})
                return ObjectiveSum(total=total, num_tokens=valid.sum(dim=1), padding=None)

            accumulator.step(objective)
    with pytest.raises(CalibrationError, match=match) as error:
        accumulator.scores()
    assert "Mine" in str(error.value)
    assert "model.layers.0.mlp" in str(error.value)


def test_constant_weights_are_an_error_of_magnitude_but_not_of_random():
    model = tiny()
    with torch.no_grad():
        for projection in model.model.layers[1].mlp.children():
            if isinstance(projection, torch.nn.Linear):
                projection.weight.fill_(0.1)
    groups = find_groups(model)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp are equal \(Magnitude"):
        weight_scores(model, groups, Magnitude())
    assert len(weight_scores(model, groups, Random(seed=0))) == 3


def test_some_dead_units_or_a_single_unit_are_no_error():
    group = Group(name="g", kind="mlp", num_units=3, slices=())
    assert checked_scores(Magnitude(), group, torch.tensor([0.0, 0.0, 1.0])).tolist() == [0, 0, 1]
    single = Group(name="g", kind="heads", num_units=1, slices=())
    assert checked_scores(Magnitude(), single, torch.tensor([2.0])).tolist() == [2]


class OwnSparse(ScoreMethod):
    def __init__(self, make):
        self.make = make

    def score(self, weight, sums):
        return self.make(weight)

    def mask(self, scores, sparsity):
        return scores <= scores.median()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda w: w * float("nan"), "scores by OwnSparse are not finite"),
        (lambda w: w / 0, "scores by OwnSparse are not finite"),
        (torch.ones_like, r"scores by OwnSparse are all equal \(1\)"),
        (torch.zeros_like, r"scores by OwnSparse are all equal \(0\)"),
        (lambda w: w[0], r"scores by OwnSparse are \[4\], not \[3, 4\]"),
    ],
)
def test_sparse_scores(make, match):
    weight = torch.arange(1.0, 13.0).reshape(3, 4)
    with pytest.raises(CalibrationError, match=match):
        OwnSparse(make).apply(weight, InputSums(), Sparsity.parse("0.5"))


def test_a_matrix_of_zeros_has_no_scores_to_rank():
    OwnSparse(torch.abs).apply(torch.zeros(3, 4), InputSums(), Sparsity.parse("0.5"))
