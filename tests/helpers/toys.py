"""Toy Llamas with any activation, with and without biases, their MLP groups and their attention-head groups."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune.criteria import ActivationCriterion
from hfprune.models import backbone, find_groups, output_head
from hfprune.models.forward import run_backbone, token_counts
from hfprune.objectives import OBJECTIVES, chunked_objective
from hfprune.plan import Group, Slice
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum
from tests.helpers.models import token_ids

VOCAB = 13
TOYS = [("silu", False), ("silu", True), ("gelu", True), ("gelu", False), ("relu", False), ("relu", True)]
LENGTHS = (5, 3, 4)


def toy(act="silu", bias=True, *, kv_heads=2, seed=0):
    """Returns a float64 Llama with random weights: 2 layers, 4 heads of 2 channels, 6 neurons."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=2, max_position_embeddings=32, hidden_act=act, mlp_bias=bias,
        attention_bias=bias, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def sequences():
    return [token_ids(1, n, seed=n, vocab=VOCAB)[0] for n in LENGTHS]


def head_groups(model):
    """One group per layer; a unit is a KV head with all query heads that read it."""
    c = model.config
    repeat = c.num_attention_heads // c.num_key_value_heads
    widths = {"q_proj": repeat * c.head_dim, "k_proj": c.head_dim, "v_proj": c.head_dim, "o_proj": repeat * c.head_dim}
    groups = []
    for layer in range(c.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        slices = tuple(
            Slice(module=f"{name}.{m}", side="in" if m == "o_proj" else "out", width=w) for m, w in widths.items()
        )
        groups.append(Group(name=name, kind="heads", num_units=c.num_key_value_heads, slices=slices))
    return tuple(groups)


def plain(groups):
    """Groups as plain data: name -> per unit, per matrix: (parameter, is it rows, channels)."""
    return {
        g.name: [
            [(f"{s.module}.weight", s.side == "out", s.channels([unit])) for s in g.slices]
            for unit in range(g.num_units)
        ]
        for g in groups
    }


def objective_sum(model, objective, ids):
    targets, valid = OBJECTIVES.get(objective).targets(ids, torch.ones_like(ids), None)
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    targets = None if targets is None else targets[valid]
    total = chunked_objective(OBJECTIVES.get(objective), hidden[valid], output_head(model), targets)
    return ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=None)


def calibrate(model, criterion, objective="cross_entropy", *, groups=None, batches=None):
    """Returns group -> scores of ``sequences``, one at a time, or of ``batches``: dictionaries as a causal LM reads them."""
    groups = (*find_groups(model), *head_groups(model)) if groups is None else groups
    accumulator = ImportanceAccumulator(model, groups, criterion)
    batches = [{"input_ids": ids[None]} for ids in sequences()] if batches is None else batches
    with accumulator.recording():
        for batch in batches:
            if isinstance(criterion, ActivationCriterion):
                accumulator.observe(lambda batch=batch: run_backbone(model, batch), *token_counts(batch))
            else:
                accumulator.step(lambda batch=batch: objective_sum(model, objective, batch["input_ids"]))
    return accumulator.scores()


def check(found, expected, *, rtol=1e-9, share=1e-12):
    """Every score of every group, up to ``rtol`` of it and ``share`` of the largest score of its group."""
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        reference = torch.tensor(scores, dtype=torch.float64)
        assert torch.isfinite(reference).all()
        torch.testing.assert_close(found[name], reference, rtol=rtol, atol=share * float(reference.abs().max()))
