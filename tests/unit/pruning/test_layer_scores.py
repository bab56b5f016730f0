"""Scores of layers against the hidden states that transformers returns, and against models with a layer left out."""

import copy
import math

import pytest
import torch
from torch import nn

from hfprune.pruning.layer_scores import layer_cosines, layer_perplexities
from hfprune.utils.errors import CalibrationError
from tests.helpers.models import tiny, token_ids
from tests.helpers.ragged import padded

LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
ROWS = [token_ids(1, n, seed=n)[0] for n in (5, 9, 3)]


@pytest.mark.parametrize("name", LAYERS)
def test_cosines_equal_a_loop_over_tokens(name):
    model = tiny(name)
    inputs = {}
    for i, layer in enumerate(model.get_submodule(LAYERS[name])):
        layer.register_forward_hook(
            lambda m, args, kwargs, out, i=i: inputs.setdefault(i, []).append(
                ((args or (kwargs["hidden_states"],))[0][0], (out[0] if isinstance(out, tuple) else out)[0])
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for row in ROWS:
            model(row[None])
    expected = []
    for pairs in inputs.values():
        found = [
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for x, y in pairs for a, b in zip(x, y, strict=True)
        ]  # fmt: skip
        expected.append(sum(found) / len(found))
    for side in ("left", "right"):
        torch.testing.assert_close(layer_cosines(tiny(name), [padded(ROWS, side)]).tolist(), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_perplexities_equal_models_without_the_layer(name):
    def perplexity(model):
        total = 0.0
        with torch.no_grad():
            for row in ROWS:
                log_p = torch.log_softmax(model(row[None], use_cache=False).logits[0], -1)
                total -= sum(float(log_p[t, y]) for t, y in enumerate(row[1:]))
        return math.exp(total / sum(len(row) - 1 for row in ROWS))

    model = tiny(name)
    owner, _, attribute = LAYERS[name].rpartition(".")
    expected = []
    for index in range(3):
        shorter = copy.deepcopy(model)
        layers = [layer for i, layer in enumerate(shorter.get_submodule(LAYERS[name])) if i != index]
        setattr(shorter.get_submodule(owner), attribute, nn.ModuleList(layers))
        shorter.config.num_hidden_layers = 2
        expected.append(perplexity(shorter) - perplexity(model))
    found = layer_perplexities(model.train(), [padded(ROWS, "left")])
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-6, atol=1e-9)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_no_data_is_an_error():
    for function in (layer_cosines, layer_perplexities):
        with pytest.raises(CalibrationError, match="calibration data is empty"):
            function(tiny(), [])
