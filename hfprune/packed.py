"""Forward passes over rows that hold several documents, which must not see each other.

Position ids that start again within a row mark the borders. transformers makes a block-diagonal causal mask of them
when it is given no attention mask, and the varlen kernels of FlashAttention read them from one long row. Which of the
two happens, or neither, depends on the model class and its attention implementation.

Shape legend: B rows, T tokens, D hidden size, N real tokens of the batch.
"""

import torch
from torch import Tensor, nn

from hfprune.arch.groups import backbone, class_name, find_spec
from hfprune.errors import UnsupportedArchitectureError

MASKED = ("eager", "sdpa", "flex_attention")
"""Attention implementations that take a mask."""

VARLEN = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention implementations that read the borders of one long row from its position ids."""


def check_packing(model: nn.Module) -> None:
    """Raises unless documents packed into one row stay apart in ``model``.

    Raises:
        UnsupportedArchitectureError: Its attention lets them see each other, or is not known not to.
    """
    spec, attention = find_spec(model), _attention(model)
    known = MASKED[:2] if spec.packing == "mask" else MASKED + VARLEN
    if attention not in known:
        raise UnsupportedArchitectureError(
            f"{class_name(model)} with the attention '{attention}' is not known to keep packed documents apart; known: "
            f"{', '.join(known)}. Load the model with one of these, or give --data.packing false."
        )


def packed_hidden(model: nn.Module, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
    """Returns the final hidden states [B, T, D] of packed rows; those of padding mean nothing.

    Args:
        model: A model that ``check_packing`` accepts.
        input_ids: [B, T].
        position_ids: [B, T], starting again at 0 with each document.
        mask: [B, T], 0 for padding.
    """
    check_packing(model)
    body, real = backbone(model), mask.bool()
    if _attention(model) in VARLEN:
        flat = _hidden(body, input_ids[real][None], position_ids[real][None])
        hidden = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        hidden[real] = flat[0]
        return hidden
    positions = _with_padding_apart(position_ids, real)
    allowed = None
    if find_spec(model).packing == "mask":
        allowed = _additive(_blocks(positions), next(model.parameters()).dtype)
    return _hidden(body, input_ids, positions, allowed)


def _hidden(body: nn.Module, input_ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    hidden: Tensor = body(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden


def _attention(model: nn.Module) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def _with_padding_apart(positions: Tensor, real: Tensor) -> Tensor:
    """Returns the position ids with every run of padding as a document of its own.

    >>> _with_padding_apart(torch.tensor([[0, 1, 0, 9, 9]]), torch.tensor([[True, True, True, False, False]]))
    tensor([[0, 1, 0, 0, 1]])
    """
    column = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    first = ~real & torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)
    start = torch.where(first, column, 0).cummax(dim=1).values
    return torch.where(real, positions, column - start)


def _blocks(positions: Tensor) -> Tensor:
    """Returns which position sees which: itself and earlier ones of its document, boolean [B, T, T]."""
    document = (positions == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return same & torch.ones_like(same[0]).tril()


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask [B, 1, T, T] that eager attention and sdpa add to their logits."""
    zero = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zero.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
