"""What recovery costs, in floating-point operations."""

from torch import nn

from hfprune.models.experts import EXPERTS
from hfprune.models.groups import find_groups, find_spec, is_supported


def forward_flops(model: nn.Module) -> int:
    """Returns the floating-point operations of one token's forward pass: two for each weight that multiplies.

    These are the weights of at least two axes but the token embedding, which counts where it is the output head too; of
    a mixture of experts those that a token goes through. Attention scores, norms and activations are left out: with
    sequences of a few hundred tokens they are a few per cent. The head counts for every token, supervised or not.
    """
    return 2 * _multiplied(model, trained=False)


def training_flops(model: nn.Module, tokens: int, *, teacher: nn.Module | None = None) -> int:
    """Returns the floating-point operations of training ``model``, adapters included, on ``tokens`` tokens.

    Forward pass and gradients of activations take two each for every weight that multiplies, gradients of weights two
    for each of those that is trained (Kaplan et al., 2020, who get 6 a weight where all are), and the forward pass of a
    teacher two for each of its own. What gradient checkpointing runs again is not counted.

    Args:
        model: As it was trained: with adapters, before they are merged.
        tokens: Tokens of all batches, padding left out.
        teacher: The model whose predictions were followed, if any.
    """
    each = 2 * forward_flops(model) + 2 * _multiplied(model, trained=True)
    return tokens * (each + (0 if teacher is None else forward_flops(teacher)))


def _multiplied(model: nn.Module, *, trained: bool) -> int:
    """Returns how many weights multiply a token's activations; of these, those that are trained."""
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


def _expert_shares(model: nn.Module) -> dict[int, float]:
    """Returns, for the weights of experts, the share of the experts that a token goes through."""
    groups = (group for group in find_groups(model, (EXPERTS,)))
    return {
        id(parameter): group.least / group.num_units
        for group in groups
        for parameter in model.get_submodule(group.name).parameters()
    }
