"""Scores of experts against loops over tokens and experts."""

import pytest
import torch

from hfprune.criteria import (
    ActivationNorm,
    ActivationTaylor,
    CoupledTaylor,
    Fisher,
    Magnitude,
    VectorTaylor,
    WandaStructured,
    WeightRange,
    scored_groups,
)
from hfprune.models import find_groups
from hfprune.pruning.accumulator import weight_scores
from hfprune.utils.errors import ConfigError
from tests.helpers.models import MIXTURES, tiny, token_ids
from tests.helpers.toys import calibrate, check
from tests.reference import taylor as slow
from tests.reference.experts import by_hand, contributions

LENGTHS = (6, 4)


def sequences():
    return [token_ids(1, n, seed=n)[0] for n in LENGTHS]


@pytest.mark.parametrize("name", MIXTURES)
def test_taylor_scores_are_what_contributions_are_worth(name):
    model = tiny(name)
    groups = find_groups(model, ("experts",))
    worth = contributions(tiny(name), sequences(), slow.objective_of("entropy"))
    tokens = sum(LENGTHS)
    forms = {
        "per_token": lambda rows: sum(row.abs().sum(0) for row in rows),
        "per_sequence": lambda rows: sum(row.sum(0).abs() for row in rows),
        "signed": lambda rows: sum(row.sum(0) for row in rows).abs(),
    }
    batches = [{"input_ids": ids[None]} for ids in sequences()]
    for reduction, form in forms.items():
        expected = {g.name: (form([w[g.layer] for w in worth]) / tokens).tolist() for g in groups}
        found = calibrate(model, ActivationTaylor(reduction=reduction), "entropy", groups=groups, batches=batches)
        check(found, expected, rtol=1e-5)  # routers and norms round to float32
        others = [other for key, other in forms.items() if key != reduction]
        for part, other in (
            (worth[:1], form),
            *((worth, other) for other in others),
        ):  # a sequence dropped; other forms
            wrong = {g.name: (other([w[g.layer] for w in part]) / tokens).tolist() for g in groups}
            with pytest.raises(AssertionError):
                check(found, wrong, rtol=1e-3)
    worth = contributions(tiny(name), sequences(), slow.objective_of("cross_entropy"))
    squares = {g.name: sum(w[g.layer].square().sum(0) for w in worth) for g in groups}
    expected = {name: (value / sum(n - 1 for n in LENGTHS)).tolist() for name, value in squares.items()}
    check(calibrate(model, Fisher(), "cross_entropy", groups=groups, batches=batches), expected, rtol=1e-5)


def test_scores_do_not_depend_on_padding_or_batch():
    model = tiny("mixtral")
    groups = find_groups(model, ("experts",))
    alone = [{"input_ids": ids[None]} for ids in sequences()]
    padded = torch.zeros(2, 6, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(sequences()):
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    one = calibrate(model, ActivationNorm(), groups=groups, batches=alone)
    both = calibrate(model, ActivationNorm(), groups=groups, batches=[{"input_ids": padded, "attention_mask": mask}])
    for name in one:
        torch.testing.assert_close(one[name], both[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_norms_are_those_of_what_experts_add(name):
    groups = find_groups(tiny(name), ("experts",))
    batches = [{"input_ids": ids[None]} for ids in sequences()]
    norms = {g.layer: [] for g in groups}
    slow_model = by_hand(tiny(name), norms=norms)
    for ids in sequences():
        slow_model(input_ids=ids[None])

    def expected(square):
        return {
            g.name: [(sum(square(t, e) for t in norms[g.layer]) / sum(LENGTHS)) ** 0.5 for e in range(6)]
            for g in groups
        }

    for implementation in ("eager", "batched_mm"):
        model = tiny(name)
        model.set_experts_implementation(implementation)
        found = calibrate(model, ActivationNorm(), groups=groups, batches=batches)
        check(found, expected(lambda t, e: t.get(e, 0.0) ** 2), rtol=1e-5)  # routers and norms round to float32
    for other in (lambda t, e: e in t, lambda t, e: t.get(e, 0.0)):  # how often; no square
        with pytest.raises(AssertionError):
            check(found, expected(other), rtol=1e-2)


def test_magnitudes_are_those_of_all_weights_however_many_are_read_at_once(monkeypatch):
    model = tiny("mixtral")
    groups = find_groups(model, ("experts",))
    criterion = Magnitude()
    sizes = weight_scores(model, scored_groups(model, groups, criterion), criterion)
    monkeypatch.setattr("hfprune.criteria.magnitude._NUMBERS", 1000)  # an expert has 768 and 384
    pieces = weight_scores(model, scored_groups(model, groups, criterion), criterion)
    assert all(torch.equal(sizes[name], pieces[name]) for name in sizes)
    for g, layer in zip(groups, model.model.layers, strict=True):
        for e in range(6):
            parts = (layer.mlp.gate.weight[e], layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.down_proj[e])
            total = sum(v * v for part in parts for v in part.flatten().tolist())
            assert float(sizes[g.name][e]) == pytest.approx(total**0.5, rel=1e-9)


def test_layers_are_scored_by_their_experts_and_heads():
    model = tiny("mixtral")
    groups = find_groups(model, ("layers",))
    assert {g.kind for g in scored_groups(model, groups, ActivationTaylor())} == {"experts", "heads"}


@pytest.mark.parametrize("criterion", [VectorTaylor(), CoupledTaylor(), WandaStructured(), WeightRange()])
def test_other_criteria_say_that_they_cannot(criterion):
    model = tiny("mixtral")
    for units in (("experts",), ("layers",)):
        with pytest.raises(ConfigError, match=f"{type(criterion).__name__} does not score experts"):
            scored_groups(model, find_groups(model, units), criterion)
