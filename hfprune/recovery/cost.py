"""Cost of recovery in floating-point operations."""

from typing import Any

from torch import nn

from hfprune.models.experts import experts_table, mixture_layers
from hfprune.models.groups import find_spec, is_supported
from hfprune.models.projection import num_channels


def forward_flops(model: nn.Module) -> int:
    """Returns the floating-point operations of the forward pass of one token: two per matrix weight.

    Matrix weights are parameters with at least two axes, without token embeddings that are not tied to the output head;
    experts count by the share of them that a token is routed to. Attention scores, norms and activations are
    neglected; they are a few per cent for sequences of a few hundred tokens. The head counts for every token.

    Args:
        model: A supported Hugging Face causal LM.
    """
    return 2 * _multiplied(model, trained=False)


def training_flops(model: nn.Module, tokens: int, *, teacher: nn.Module | None = None) -> int:
    """Returns the floating-point operations of training ``model``, including its adapters, on ``tokens`` tokens.

    Forward pass and activation gradients cost two operations each per matrix weight, weight gradients two per trained
    matrix weight (Kaplan et al., 2020, arXiv:2001.08361: six per weight if all are trained), and the forward pass of a
    teacher two per matrix weight. Recomputation by gradient checkpointing is not counted.

    Args:
        model: The trained model, with adapters that are not merged.
        tokens: Number of tokens without padding.
        teacher: The teacher model, or None.
    """
    each = 2 * forward_flops(model) + 2 * _multiplied(model, trained=True)
    return tokens * (each + (0 if teacher is None else forward_flops(teacher)))


def _multiplied(model: nn.Module, *, trained: bool) -> int:
    """Returns the number of matrix weights, or of the trained ones among them."""
    inner = next((m for m in model.modules() if is_supported(m)), None)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    shares = _expert_shares(inner) if inner is not None and find_spec(inner).experts is not None else {}
    count = 0.0
    for parameter in model.parameters():
        multiplies = parameter.dim() >= 2 and (id(parameter) not in looked_up or id(parameter) in heads)
        if multiplies and (parameter.requires_grad or not trained):
            count += parameter.numel() * shares.get(id(parameter), 1.0)
    return int(count)


def _expert_shares(model: Any) -> dict[int, float]:
    """Returns parameter id -> share of the experts that a token is routed to, for the weights of experts."""
    spec = find_spec(model)
    table, layers = experts_table(spec), spec.find_layers(model)
    chosen = getattr(model.config, table.chosen_key)
    return {
        id(parameter): chosen / num_channels(router, "out")
        for index, router in mixture_layers(model, spec).items()
        for parameter in layers[index].get_submodule(table.experts).parameters()
    }
