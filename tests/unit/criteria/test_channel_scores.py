"""Scores of hidden channels against loops: sums over what reads and writes the residual stream."""

import pytest
import torch

from hfprune.criteria import (
    ActivationNorm,
    ActivationTaylor,
    CoupledTaylor,
    Fisher,
    Magnitude,
    SlimLLMChannels,
    SlimLLMHeads,
    VectorTaylor,
    WandaStructured,
    WeightTaylor,
    scored_groups,
)
from hfprune.models import find_groups
from hfprune.pruning.accumulator import weight_scores
from hfprune.utils.errors import ConfigError
from tests.helpers.toys import calibrate, check, sequences, toy
from tests.reference import taylor as slow
from tests.reference.channels import read_products

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
FORMS = [
    (VectorTaylor(), "vectorize", "sequence", True),
    (WeightTaylor(), "param_first", "sequence", False),
    (WeightTaylor(gradient="dataset"), "param_first", "dataset", False),
    (WeightTaylor(salience="param_second"), "param_second", "sequence", False),
    (WeightTaylor(salience="param_mix"), "param_mix", "sequence", False),
]


def table(model, *, outside, norms=False, drop=()):
    """Hidden channels as plain data: per channel, every matrix as (parameter, whether channels are rows, channels)."""
    layers = [f"model.layers.{i}.{n}" for i in range(len(model.model.layers)) for n in (*READERS, *WRITERS)]
    names = ["model.embed_tokens", *layers, "lm_head"] if outside else layers
    if norms:
        names += [name for name, module in model.named_modules() if name.endswith("norm")]
    names = [name for name in names if name not in drop]
    rows = (*WRITERS, "norm")
    return {
        "channels": [[(f"{n}.weight", n.endswith(rows), [j]) for n in names] for j in range(model.config.hidden_size)]
    }


def scored(model, criterion):
    return scored_groups(model, find_groups(model, ("channels",)), criterion)


def found(model, criterion, **kwargs):
    return calibrate(model, criterion, groups=scored(model, criterion), **kwargs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("criterion", "salience", "gradient", "outside"), FORMS)
def test_llm_pruner_equals_loops(criterion, salience, gradient, outside, bias):
    model = toy("silu", bias)
    groups = table(model, outside=outside, norms=outside)
    expected = slow.llm_pruner(model, sequences(), "cross_entropy", groups, salience, gradient=gradient)
    scores = found(toy("silu", bias), criterion)
    check(scores, expected, rtol=1e-6)  # norms round gradients to float32
    for name in (
        "model.embed_tokens",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.k_proj",
        "lm_head",
        "model.norm",
    ):
        less = table(model, outside=outside, norms=outside, drop=(name,))
        if less != groups:
            other = slow.llm_pruner(model, sequences(), "cross_entropy", less, salience, gradient=gradient)
            with pytest.raises(AssertionError):
                check(scores, other, rtol=1e-4)


@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
def test_activation_taylor_equals_loops(objective):
    products = read_products(toy().requires_grad_(True), sequences(), slow.objective_of(objective))
    tokens = sum(len(ids) - (objective == "cross_entropy") for ids in sequences())
    size = products[0][0].shape[1]
    for reduction in ("per_token", "per_sequence", "signed"):
        expected = []
        for j in range(size):
            rows = [[reader[:, j].tolist() for reader in sequence] for sequence in products]
            if reduction == "per_token":
                total = sum(abs(v) for sequence in rows for reader in sequence for v in reader)
            elif reduction == "per_sequence":
                total = sum(abs(sum(reader)) for sequence in rows for reader in sequence)
            else:
                total = abs(sum(v for sequence in rows for reader in sequence for v in reader))
            expected.append(total / tokens)
        scores = found(toy(), ActivationTaylor(reduction=reduction), objective=objective)
        check(scores, {"channels": expected}, rtol=1e-6)
        assert not torch.allclose(scores["channels"], 1.01 * scores["channels"])


def test_fisher_equals_loops():
    products = read_products(toy().requires_grad_(True), sequences(), slow.objective_of("cross_entropy"))
    tokens = sum(len(ids) - 1 for ids in sequences())
    squares = [reader.square().sum(0) for sequence in products for reader in sequence]
    check(found(toy(), Fisher()), {"channels": (sum(squares) / tokens).tolist()}, rtol=1e-6)


def test_scores_of_activations_sum_over_the_readers_of_the_layers():
    model = toy()
    inputs = {}
    for i, layer in enumerate(model.model.layers):
        for name in READERS:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda m, args, key=(i, name): inputs.setdefault(key, []).append(args[0][0])
            )
    for ids in sequences():
        model(input_ids=ids[None])
    tokens = sum(map(len, sequences()))
    squares, wanda = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for (i, name), parts in inputs.items():
        square = torch.cat(parts).square().sum(0) / tokens
        squares += square
        wanda += square.sqrt() * model.model.layers[i].get_submodule(name).weight.abs().sum(0)
    check(found(toy(), ActivationNorm()), {"channels": squares.sqrt().tolist()})
    check(found(toy(), WandaStructured()), {"channels": wanda.tolist()})


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude_equals_loops(norm):
    model = toy()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = []
    for unit in table(model, outside=True)["channels"]:
        values = [v for matrix in unit for row in slow.vectors(weights, matrix) for v in row]
        expected.append(sum(map(abs, values)) if norm == "l1" else sum(v * v for v in values) ** 0.5)
    criterion = Magnitude(norm=norm)
    check(weight_scores(model, scored(model, criterion), criterion), {"channels": expected})


@pytest.mark.parametrize("criterion", [CoupledTaylor(), SlimLLMChannels(), SlimLLMHeads()])
def test_criteria_that_cannot_score_channels_say_so(criterion):
    with pytest.raises(ConfigError, match=f"{type(criterion).__name__}.*channels"):
        found(toy(), criterion)
