"""Slow references of sub-layer scores: the residual stream in plain loops, one token and one sub-layer at a time."""

import contextlib
import math

import torch

PATHS = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma3": ("model.layers", "self_attn", "mlp"),
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "gpt_neox_sequential": ("gpt_neox.layers", "attention", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
    "mixtral": ("model.layers", "self_attn", "mlp"),
}
"""Model -> layers, and the modules of a layer that give the output of attention and MLP."""


@contextlib.contextmanager
def without(model, name, layer, kind):
    """Context in which one sub-layer of a model returns zeros."""
    layers, attention, mlp = PATHS[name]
    module = model.get_submodule(f"{layers}.{layer}.{attention if kind == 'attention' else mlp}")
    forward = module.forward

    def zeros(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    module.forward = zeros
    try:
        yield
    finally:
        del module.forward


def log_probabilities(model, row):
    with torch.no_grad():
        return torch.log_softmax(model(row[None], use_cache=False).logits[0], -1)


def divergence(model, name, layer, kind, rows):
    """Returns the mean over tokens of KL(dense || model without the sub-layer)."""
    found = []
    for row in rows:
        dense = log_probabilities(model, row)
        with without(model, name, layer, kind):
            changed = log_probabilities(model, row)
        found += [
            sum(math.exp(p) * (p - q) for p, q in zip(a, b, strict=True))
            for a, b in zip(dense.tolist(), changed.tolist(), strict=True)
        ]
    return sum(found) / len(found)


def cross_entropy(model, rows):
    """Returns the mean over predicted tokens of the negative log probability."""
    found = [-float(p[t, y]) for row in rows for p in [log_probabilities(model, row)] for t, y in enumerate(row[1:])]
    return sum(found) / len(found)


def cosine_influence(model, name, layer, kind, rows):
    """Returns 1 - mean cosine of the stream before and after a sub-layer, from runs with and without sub-layers.

    What the attention adds is the change of a layer's output between a run without both sub-layers and one without the
    MLP. What the MLP adds in a sequential layer is the change between a run without the MLP and a full one.
    """
    layers = PATHS[name][0]
    parallel = name == "gpt_neox"

    def output(row, *lost):
        seen = []

        def hook(module, args, found):
            seen.append((found[0] if isinstance(found, tuple) else found)[0])

        handle = model.get_submodule(f"{layers}.{layer}").register_forward_hook(hook)
        with contextlib.ExitStack() as stack, torch.no_grad():
            for part in lost:
                stack.enter_context(without(model, name, layer, part))
            model(row[None], use_cache=False)
        handle.remove()
        return seen[0]

    cosines = []
    for row in rows:
        neither = output(row, "attention", "mlp")
        if kind == "attention":
            before, after = neither, output(row, "mlp")
        elif parallel:
            before, after = neither, output(row, "attention")
        else:
            before, after = output(row, "mlp"), output(row)
        for x, y in zip(before, after, strict=True):
            cosines.append(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
    return 1 - sum(cosines) / len(cosines)


def greedy_order(model, name, kind, rows, count):
    """Returns the layers whose attention or MLP is removed first, second, ... by the KL to the dense model."""
    dense, removed = [log_probabilities(model, row) for row in rows], []
    while len(removed) < count:
        costs = {}
        for layer in set(range(3)) - set(removed):
            with contextlib.ExitStack() as stack:
                for lost in (*removed, layer):
                    stack.enter_context(without(model, name, lost, kind))
                changed = [log_probabilities(model, row) for row in rows]
            costs[layer] = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(dense, changed, strict=True))
        removed.append(min(costs, key=costs.get))
    return removed
