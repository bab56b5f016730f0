"""Scores of whole layers and sub-layers: equal to loops over models without each one."""

import math

import pytest
import torch

import hfprune
from hfprune.criteria import Magnitude
from hfprune.models import find_groups
from hfprune.plan import SUBLAYERS
from hfprune.pruning.layer_scores import layer_cosines, layer_perplexities
from hfprune.pruning.options import CalibrationOptions, DepthScores, PruningOptions
from hfprune.pruning.prunable import PrunableModel
from hfprune.pruning.removal_scores import check_depth, removal_scores
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.models import tiny, token_ids
from tests.helpers.ragged import padded
from tests.reference import sublayers as reference

ROWS = [token_ids(1, n, seed=n)[0] for n in (5, 9, 3)]
BATCHES = [padded(ROWS, "left")]
EACH = [(f"{part}_sublayers", part) for part in ("attention", "mlp")]


def found(model, measure, units=SUBLAYERS):
    """Returns (kind, layer) -> score."""
    groups = find_groups(model, units)
    scores = removal_scores(model, groups, BATCHES, measure)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return {(group.kind, group.layer): float(scores[group.name]) for group in groups}


@pytest.mark.parametrize("name", sorted(reference.PATHS))
def test_kl_and_cosine_equal_loops(name):
    model = tiny(name)
    by_kl, by_cosine = found(model, "kl"), found(model, "cosine")
    for kind, part in EACH:
        for layer in range(3):
            kl = reference.divergence(model, name, layer, part, ROWS)
            assert by_kl[kind, layer] == pytest.approx(kl, rel=1e-8)
            cosine = reference.cosine_influence(model, name, layer, part, ROWS)
            assert by_cosine[kind, layer] == pytest.approx(cosine, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_losses_equal_loops(name):
    model = tiny(name).train()
    losses, perplexities = found(model, "cross_entropy"), found(model, "perplexity")
    assert model.training
    model.eval()
    whole = reference.cross_entropy(model, ROWS)
    for kind, part in EACH:
        for layer in range(3):
            with reference.without(model, name, layer, part):
                loss = reference.cross_entropy(model, ROWS)
            assert losses[kind, layer] == pytest.approx(loss - whole, rel=1e-6, abs=1e-12)
            assert perplexities[kind, layer] == pytest.approx(math.exp(loss) - math.exp(whole), rel=1e-6, abs=1e-10)


def test_layers_are_scored_as_before():
    model = tiny("llama")
    groups = find_groups(model, ("layers",))
    by_cosine = removal_scores(model, groups, BATCHES, "cosine")["model.layers"]
    torch.testing.assert_close(by_cosine, 1 - layer_cosines(model, BATCHES))
    by_perplexity = removal_scores(model, groups, BATCHES, "perplexity")["model.layers"]
    torch.testing.assert_close(by_perplexity, layer_perplexities(model, BATCHES))


def test_scores_of_a_call_mix_criterion_and_measure():
    model = tiny("llama")
    units = ("mlp", "attention_sublayers", "layers")
    scores = hfprune.score(model, iter(BATCHES), Magnitude(), units=units, depth_scores="kl")
    assert list(scores) == [group.name for group in find_groups(model, units)]
    expected = removal_scores(model, find_groups(model, units[1:]), BATCHES, "kl")
    for name, values in expected.items():
        assert torch.equal(scores[name], values)
    sums = hfprune.score(model, criterion=Magnitude(), units=(*units, "heads"))
    heads = sums["model.layers.1.self_attn"].sum()
    assert float(sums["model.layers.1.attention_sublayer"]) == pytest.approx(float(heads))
    alone = hfprune.score(model, criterion=Magnitude(), units=("mlp_sublayers",))["model.layers.2.mlp_sublayer"]
    assert float(alone) == pytest.approx(float(scores["model.layers.2.mlp"].sum()))


@pytest.mark.parametrize("measure", ["kl", "cosine", "cross_entropy"])
def test_no_tokens_is_an_error(measure):
    model = tiny("llama")
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        removal_scores(model, find_groups(model, SUBLAYERS), [], measure)


def test_a_score_that_is_not_finite_is_an_error():
    model = tiny("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.inf
    with pytest.raises(CalibrationError, match="A score of model.layers.0.attention_sublayer by kl is nan"):
        removal_scores(model, find_groups(model, SUBLAYERS), BATCHES, "kl")


def test_settings_are_checked():
    assert CalibrationOptions(depth_scores="cosine").depth == DepthScores(measure="cosine")
    with pytest.raises(ConfigError, match="depth_scores='cos' is not one of cosine, cross_entropy, perplexity, kl"):
        CalibrationOptions(depth_scores="cos")
    with pytest.raises(ConfigError, match="sequences=0 must be positive"):
        DepthScores(sequences=0)
    with pytest.raises(ConfigError, match="the units are mlp. Add one of attention_sublayers, mlp_sublayers, layers"):
        PruningOptions(budget=hfprune.Budget(pruning_ratio=0.2), calibration=CalibrationOptions(depth_scores="kl"))


def test_sharded_models_and_unknown_classes_are_refused():
    model = PrunableModel(tiny("llama"))
    with pytest.raises(ConfigError, match="depth_scores cannot measure sharded models"):
        check_depth(model, DepthScores(), sharded=True)
    with pytest.raises(ConfigError, match="requires a Hugging Face model of a supported architecture"):
        check_depth(PrunableModel(torch.nn.Linear(2, 2)), DepthScores(), sharded=False)
    check_depth(model, None, sharded=True)
    check_depth(model, DepthScores(), sharded=False)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_removal_equals_a_loop(seed):
    model = tiny("llama", seed=seed)
    expected = reference.greedy_order(model, "llama", "attention", ROWS, 2)
    groups = find_groups(model, ("attention_sublayers",))
    for count in (1, 2, 9):
        scores = removal_scores(model, groups, BATCHES, "kl", greedy={"attention_sublayers": count})
        positions = [float(scores[group.name]) for group in groups]
        assert sorted(positions) == [1.0, 2.0, 3.0]
        order = sorted(range(3), key=lambda layer: positions[layer])
        assert order[: min(count, 2)] == expected[:count]


def test_greedy_removal_of_several_kinds():
    model = tiny("llama")
    units = ("attention_sublayers", "layers")
    scores = hfprune.score(model, BATCHES, units=units, depth_scores=DepthScores(measure="perplexity", greedy=True))
    assert sorted(scores["model.layers"].tolist()) == [1.0, 2.0, 3.0]
    assert sorted(float(scores[g.name]) for g in find_groups(model, units[:1])) == [1.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match="greedy=True measures outputs"):
        DepthScores(measure="cosine", greedy=True)
