"""Scores of experts against loops over tokens and experts."""

import pytest
import torch

from hfprune.criteria import (
    ActivationNorm,
    ActivationTaylor,
    CoupledTaylor,
    Fisher,
    Magnitude,
    Reap,
    VectorTaylor,
    WandaStructured,
    WeightRange,
    scored_groups,
)
from hfprune.models import find_groups
from hfprune.pruning.accumulator import check_criterion, weight_scores
from hfprune.utils.errors import ConfigError
from tests.helpers.models import MIXTURES, tiny, token_ids
from tests.helpers.toys import calibrate, check
from tests.reference import taylor as slow
from tests.reference.experts import by_hand, contributions, mean_over_routed

LENGTHS = (6, 4)


def sequences():
    return [token_ids(1, n, seed=n)[0] for n in LENGTHS]


def own_columns(groups, worth):
    """Returns, for each sequence, group -> its columns of what every expert of the layer is worth."""
    return [{g.name: w[g.layer][:, experts_of(g)] for g in groups} for w in worth]


def experts_of(group):
    return group.slices[0].channels(range(group.num_units))


@pytest.mark.parametrize("name", MIXTURES)
def test_taylor_scores_are_what_contributions_are_worth(name):
    seed = 3 if name == "deepseek_v3_groups" else 0  # each group of a router has tokens that count
    model = tiny(name, seed=seed)
    groups = find_groups(model, ("experts",))
    worth = own_columns(groups, contributions(tiny(name, seed=seed), sequences(), slow.objective_of("entropy")))
    tokens = sum(LENGTHS)
    forms = {
        "per_token": lambda rows: sum(row.abs().sum(0) for row in rows),
        "per_sequence": lambda rows: sum(row.sum(0).abs() for row in rows),
        "signed": lambda rows: sum(row.sum(0) for row in rows).abs(),
    }
    batches = [{"input_ids": ids[None]} for ids in sequences()]
    for reduction, form in forms.items():
        expected = {g.name: (form([w[g.name] for w in worth]) / tokens).tolist() for g in groups}
        found = calibrate(model, ActivationTaylor(reduction=reduction), "entropy", groups=groups, batches=batches)
        check(found, expected, rtol=3e-5, share=1e-5)  # routers and norms round to float32
        others = [other for key, other in forms.items() if key != reduction]
        for part, other in (
            (worth[:1], form),
            *((worth, other) for other in others),
        ):  # a sequence dropped; other forms
            wrong = {g.name: (other([w[g.name] for w in part]) / tokens).tolist() for g in groups}
            if name == "llama4" and wrong == expected:  # top-1: an expert has at most one token of a sequence
                continue
            with pytest.raises(AssertionError):
                check(found, wrong, rtol=1e-3)
    worth = own_columns(groups, contributions(tiny(name, seed=seed), sequences(), slow.objective_of("cross_entropy")))
    squares = {g.name: sum(w[g.name].square().sum(0) for w in worth) for g in groups}
    expected = {name: (value / sum(n - 1 for n in LENGTHS)).tolist() for name, value in squares.items()}
    check(calibrate(model, Fisher(), "cross_entropy", groups=groups, batches=batches), expected, rtol=3e-5, share=1e-5)


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
            g.name: [(sum(square(t, e) for t in norms[g.layer]) / sum(LENGTHS)) ** 0.5 for e in experts_of(g)]
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


@pytest.mark.parametrize("name", MIXTURES)
def test_reap_is_the_mean_over_the_tokens_of_an_expert(name):
    groups = find_groups(tiny(name), ("experts",))
    norms = {g.layer: [] for g in groups}
    slow_model = by_hand(tiny(name), norms=norms)
    for ids in sequences():
        slow_model(input_ids=ids[None])
    means = {layer: mean_over_routed(tokens, 6) for layer, tokens in norms.items()}
    expected = {g.name: [means[g.layer][e] for e in experts_of(g)] for g in groups}
    padded = torch.zeros(2, 6, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(sequences()):
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    alone = [{"input_ids": ids[None]} for ids in sequences()]
    for batches in (alone, [{"input_ids": padded, "attention_mask": mask}]):
        check(calibrate(tiny(name), Reap(), groups=groups, batches=batches), expected, rtol=3e-5)
    found = calibrate(tiny(name), Reap(), groups=groups, batches=alone)
    every = {g.name: [sum(t.get(e, 0.0) for t in norms[g.layer]) / 10 for e in experts_of(g)] for g in groups}
    with pytest.raises(AssertionError):  # the mean over all tokens
        check(found, every, rtol=1e-2)


def test_reap_scores_experts_alone():
    model = tiny("mixtral")
    for units in (("heads",), ("layers",)):
        with pytest.raises(ConfigError, match="Reap scores experts, not the units of"):
            check_criterion(model, find_groups(model, units), Reap())


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
