"""Criteria of one forward pass against loops over every token's activations, for MLP neurons and attention heads."""

import pytest
import torch

from hfprune.criteria import (
    ActivationNorm,
    Magnitude,
    SlimLLMChannels,
    SlimLLMHeads,
    WandaStructured,
    WeightRange,
    WeightTaylor,
    resolve_objective,
)
from hfprune.models import find_groups
from hfprune.models.forward import run_backbone, token_counts
from hfprune.pruning.accumulator import ImportanceAccumulator
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.models import tiny, token_ids
from tests.helpers.ragged import padded
from tests.helpers.toys import TOYS, VOCAB, calibrate, check, head_groups, plain, sequences, toy
from tests.reference import activations as slow


def seen_by(model, groups):
    modules = {s.module for g in groups for s in g.slices}
    return slow.record(model, sequences(), modules), dict(model.state_dict()), sum(map(len, sequences()))


@pytest.mark.parametrize(("act", "bias"), TOYS)
def test_norms_equal_loops(act, bias):
    model = toy(act, bias)
    groups = (*find_groups(model), *head_groups(model))
    seen, weights, tokens = seen_by(model, groups)
    units = plain(groups)
    check(calibrate(model, ActivationNorm()),
          {n: [slow.activation_norm(u, seen, tokens) for u in us] for n, us in units.items()})  # fmt: skip
    for projections in ("consumers", "all"):
        expected = {
            n: [slow.wanda(u, weights, seen, tokens, producers=projections == "all") for u in us]
            for n, us in units.items()
        }
        check(calibrate(model, WandaStructured(projections=projections)), expected)
    check(calibrate(model, WeightRange()), {n: slow.weight_range(us, weights, seen, tokens) for n, us in units.items()})


@pytest.mark.parametrize(("act", "bias"), TOYS)
def test_slimllm_channels_equal_loops(act, bias):
    model = toy(act, bias)
    groups = find_groups(model)
    seen, weights, _ = seen_by(model, groups)
    found = calibrate(model, SlimLLMChannels(), groups=groups)
    check(found, {n: [slow.slimllm_channel(u, weights, seen) for u in us] for n, us in plain(groups).items()})
    for dropped in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        wrong = {n: [slow.slimllm_channel(u, weights, seen, drop=[dropped]) for u in us]
                 for n, us in plain(groups).items()}  # fmt: skip
        with pytest.raises(AssertionError):
            check(found, wrong)


def test_slimllm_keeps_the_lowest_where_asked():
    groups = find_groups(toy())
    plainly = calibrate(toy(), SlimLLMChannels(), groups=groups)
    lifted = calibrate(toy(), SlimLLMChannels(keep_lowest=0.25), groups=groups)  # round(1.5) == 2 of 6
    for name, score in plainly.items():
        order, other = score.argsort().tolist(), lifted[name].argsort().tolist()
        assert other == [*order[2:], *order[:2]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_slimllm_heads_equal_pearson_over_tokens(kv_heads, bias):
    model = toy(bias=bias, kv_heads=kv_heads)
    groups = head_groups(model)
    seen, weights, _ = seen_by(model, groups)
    found = calibrate(model, SlimLLMHeads(), groups=groups)
    check(found, {n: slow.head_scores(us, weights, seen) for n, us in plain(groups).items()}, rtol=1e-7)


def test_slimllm_exchanges_equal_the_direct_search():
    """Heads on 12 models, so that some exchange happens; the kept set is the best so found."""
    exchanged = 0
    for seed in range(6):
        model = toy(kv_heads=4, bias=False, seed=seed)
        groups = head_groups(model)
        seen, weights, _ = seen_by(model, groups)
        ranks = calibrate(model, SlimLLMHeads(dropped=0.5), groups=groups)
        scores = calibrate(model, SlimLLMHeads(), groups=groups)
        for name, units in plain(groups).items():
            kept = sorted(ranks[name].argsort()[2:].tolist())
            assert kept == slow.refined(units, weights, seen, 2)
            assert sorted(ranks[name].tolist()) == [1, 2, 3, 4]
            exchanged += kept != sorted(scores[name].argsort()[2:].tolist())
    assert exchanged > 0


@pytest.mark.parametrize(
    "criterion",
    [ActivationNorm(), WandaStructured(projections="all"), WeightRange(), SlimLLMChannels()],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("name", ["llama_untied_bias", "opt", "gpt2", "phi3"])
def test_batches_and_padding_make_no_difference(name, criterion):
    """Exact sums are the same to rounding of the forward pass; padding holds real token ids."""
    rows = [token_ids(1, n, seed=n)[0] for n in (4, 9, 6, 7, 3)]
    model = tiny(name)
    groups = find_groups(model)
    alone = calibrate(model, criterion, groups=groups, batches=[{"input_ids": row[None]} for row in rows])
    for side in ("left", "right"):
        batches = [padded(rows[:2], side), padded(rows[2:], side)]
        found = calibrate(model, criterion, groups=groups, batches=batches)
        for group, score in alone.items():
            torch.testing.assert_close(found[group], score, rtol=1e-6, atol=0)


def test_two_ranks_add_up_to_one():
    model = toy()
    groups = (*find_groups(model), *head_groups(model))
    batches = [{"input_ids": ids[None]} for ids in sequences()]
    for criterion, mine in ((WandaStructured(), groups), (SlimLLMHeads(), head_groups(model))):
        expected = calibrate(model, criterion, groups=mine)
        ranks = []
        for share in (batches[:1], batches[1:]):
            rank = ImportanceAccumulator(model, mine, criterion)
            with rank.recording():
                for batch in share:
                    rank.observe(lambda batch=batch: run_backbone(model, batch), *token_counts(batch))
            ranks.append(rank)
        ranks[0].load([a + b for a, b in zip(*(rank.tensors() for rank in ranks), strict=True)])
        for name, score in ranks[0].scores().items():
            torch.testing.assert_close(score, expected[name], rtol=1e-12, atol=0)


def test_no_gradient_no_head_and_nothing_stays_hooked(monkeypatch):
    model = toy().train()
    model.requires_grad_(True)
    monkeypatch.setattr(model.lm_head, "forward", None)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    calibrate(model, ActivationNorm())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("criterion", [SlimLLMChannels(), WeightTaylor()])
def test_autocast_does_not_round_the_products(criterion, monkeypatch):
    """Matrix products of rounded signals run in float32: none of them comes out of the criterion in bfloat16."""
    model, batch, kinds = toy().float(), {"input_ids": token_ids(1, 8, vocab=VOCAB)}, set()
    original = type(criterion).rows

    def rows(self, *args):
        kinds.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return original(self, *args)

    monkeypatch.setattr(type(criterion), "rows", rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate(model, criterion, groups=find_groups(model), batches=[batch])
    assert kinds == {torch.float32}


def test_overflow_is_named_and_zero_activations_are_an_error():
    model = toy()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e200)
    with pytest.raises(CalibrationError, match=r"scores of model\.layers\.1\.mlp are not finite \(1 of 2 groups\)"):
        calibrate(model, ActivationNorm(), groups=find_groups(model))
    model = toy("relu", bias=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with pytest.raises(CalibrationError, match="its activations or its weights are zero"):
        calibrate(model, ActivationNorm(), groups=find_groups(model))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WandaStructured(projections="in"), "choose one of consumers, all"),
        (lambda: SlimLLMChannels(keep_lowest=1.0), "not a share"),
        (lambda: SlimLLMHeads(dropped=0), "not a share"),
        (lambda: calibrate(toy(), SlimLLMChannels(), groups=head_groups(toy())), "kind 'heads'"),
        (lambda: calibrate(toy(), SlimLLMHeads(), groups=find_groups(toy())), "kind 'mlp'"),
        (lambda: resolve_objective(ActivationNorm(), "entropy"), "takes no objective, but 'entropy'"),
        (lambda: resolve_objective(Magnitude(), "entropy"), "reads weights alone"),
    ],
)
def test_impossible_settings_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
