"""Forward passes shared by calibration, recovery and evaluation.

Position ids that restart within a row mark the boundaries of packed documents. Without an attention mask, transformers
derives a block-diagonal causal mask from them, and the varlen kernels of FlashAttention read them from one long row.
The model class and its attention implementation decide which of the two applies, if any.

Final hidden states are small (24 MB for 20k tokens at hidden size 576) and are stored in place of [T, V] logits.

Shape legend: B rows, T tokens, D hidden size, N windows of W tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.contexts import inference
from hfprune.models.groups import backbone, class_name, find_spec
from hfprune.models.output_head import output_head
from hfprune.objectives import Objective, Term, chunked_objective, chunked_objectives
from hfprune.objectives.base import IGNORE_INDEX
from hfprune.objectives.teacher import HiddenPredictions, Predictions
from hfprune.utils.compat import attention_implementation
from hfprune.utils.errors import ConfigError, UnsupportedArchitectureError
from hfprune.utils.progress import steps

MASKED = ("eager", "sdpa", "flex_attention")
"""Attention implementations that accept a mask."""

VARLEN = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention implementations that read document boundaries of one long row from its position ids."""


def check_packing(model: nn.Module) -> None:
    """Checks that packed documents do not attend to each other in ``model``.

    Raises:
        UnsupportedArchitectureError: The attention implementation is not known to separate documents.
    """
    spec, attention = find_spec(model), attention_implementation(model.config)
    if spec.packing == "none":
        raise UnsupportedArchitectureError(
            f"{class_name(model)} does not separate packed documents: set packing=False, so that each row holds one."
        )
    known = MASKED + VARLEN if spec.packing == "positions" else MASKED[:2]
    if attention not in known:
        raise UnsupportedArchitectureError(
            f"{class_name(model)} with the attention '{attention}' is not known to separate packed documents. Load the "
            f"model with one of {', '.join(known)}, or set packing=False."
        )


def forward_packed(model: nn.Module, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
    """Returns the final hidden states [B, T, D] of packed rows; values at padding are undefined.

    Args:
        model: A model that ``check_packing`` accepts.
        input_ids: [B, T].
        position_ids: [B, T], restarting at 0 with each document.
        mask: [B, T], 0 for padding.
    """
    check_packing(model)
    body, real = backbone(model), mask.bool()
    if attention_implementation(model.config) in VARLEN:
        flat = _hidden(body, input_ids[real][None], position_ids[real][None])
        hidden = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        hidden[real] = flat[0]
        return hidden
    positions = _with_padding_apart(position_ids, real)
    return _hidden(body, input_ids, positions, _packed_mask(model, positions))


def _packed_mask(model: Any, positions: Tensor) -> Any:
    """Returns the additive mask of packed rows as the class reads it; None if it derives it from position ids."""
    packing = find_spec(model).packing
    if packing == "positions":
        return None
    allowed, dtype = _blocks(positions), next(model.parameters()).dtype
    full = _additive(allowed, dtype)
    if packing == "mask":
        return full
    near = torch.ones_like(allowed[0]).triu(1 - model.config.sliding_window)
    return {"full_attention": full, "sliding_attention": _additive(allowed & near, dtype)}


def _hidden(body: nn.Module, input_ids: Tensor, positions: Tensor, mask: Any = None) -> Tensor:
    hidden: Tensor = body(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden


def _with_padding_apart(positions: Tensor, real: Tensor) -> Tensor:
    """Returns the position ids with every run of padding as a separate document.

    >>> _with_padding_apart(torch.tensor([[0, 1, 0, 9, 9]]), torch.tensor([[True, True, True, False, False]]))
    tensor([[0, 1, 0, 0, 1]])
    """
    column = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    first = ~real & torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)
    start = torch.where(first, column, 0).cummax(dim=1).values
    return torch.where(real, positions, column - start)


def _blocks(positions: Tensor) -> Tensor:
    """Returns the boolean block-diagonal causal mask [B, T, T]."""
    document = (positions == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return same & torch.ones_like(same[0]).tril()


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the additive mask [B, 1, T, T] of eager attention and sdpa."""
    zero = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zero.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


Batch = Mapping[str, Tensor]
"""``input_ids`` [B, T], and optionally ``attention_mask``, ``labels`` and ``position_ids`` [B, T]. Position ids that
restart at 0 within a row mark packed documents, which do not attend to each other."""


def as_batch(batch: Any) -> dict[str, Tensor]:
    """Returns the tensors of ``batch`` that a causal LM reads.

    Args:
        batch: A mapping with ``input_ids`` [B, T], an integer tensor of token ids [B, T], or a tuple or list whose
            first element is either.

    Raises:
        ConfigError: The batch contains no tensor that can be identified as token ids.
    """
    if isinstance(batch, tuple | list) and batch:
        return as_batch(batch[0])
    if isinstance(batch, Tensor) and batch.dim() == 2 and not batch.dtype.is_floating_point:
        return {"input_ids": batch}
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        return {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}
    found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ConfigError(
        "Calibration reads token ids from the batch: a mapping with 'input_ids' [B, T], or an integer tensor [B, T]. "
        f"Found: {found}."
    )


def sequences(batch: Batch) -> list[dict[str, Tensor]]:
    """Splits ``batch`` into its sequences, each [1, T_n] and without padding. Packed rows are split into documents.

    The results of a sequence then have the same bits for every batch.

    >>> batch = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> sequences(batch)
    [{'input_ids': tensor([[5, 6]])}]
    """
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    found = []
    for row in range(len(ids)):
        real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
        restarts = [] if positions is None else (positions[row][real] == 0).nonzero().flatten().tolist()
        starts = sorted({0, *restarts})
        index = real.nonzero().flatten()
        for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
            part = index[start:end]
            if len(part):
                names = [name for name in ("input_ids", "labels") if name in batch]
                found.append({name: batch[name][row : row + 1, part] for name in names})
    return found


_MAX_TOKENS_TOGETHER = 8192
"""Maximum number of tokens per forward pass on accelerators in :func:`run_together`."""


def run_together(found: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Joins neighbouring sequences of equal length for accelerators, which one sequence does not saturate.

    On the CPU every sequence runs alone.

    >>> two = [{"input_ids": torch.zeros(1, 3)}, {"input_ids": torch.ones(1, 3)}]
    >>> [batch["input_ids"].shape for batch in run_together(two, torch.device("cuda"))]
    [torch.Size([2, 3])]

    Args:
        found: Sequences [1, T] or batches of them, without padding.
        device: Device of the forward passes.
    """
    if device.type == "cpu":
        return list(found)
    batches: list[list[Batch]] = []
    for one in found:
        shape = one["input_ids"].shape
        if batches and batches[-1][0]["input_ids"].shape[1] == shape[1] and batches[-1][0].keys() == one.keys():
            rows = sum(len(batch["input_ids"]) for batch in batches[-1]) + shape[0]
            if rows * shape[1] <= _MAX_TOKENS_TOGETHER:
                batches[-1].append(one)
                continue
        batches.append([one])
    return [{name: torch.cat([batch[name] for batch in part]) for name in part[0]} for part in batches]


def is_packed(batch: Batch) -> bool:
    """Returns whether rows of ``batch`` contain several documents (position ids that restart within a row)."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None:
        return False
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.bool()
    return bool((((positions == 0) & real).sum(dim=1) > 1).any())


def objective_sum(model: nn.Module, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums an objective over the tokens of a batch.

    Args:
        model: A supported Hugging Face causal LM; its head is applied to one chunk of tokens at a time.
        objective: The objective.
        batch: One sequence per row with padding on either side, or packed rows.

    Returns:
        The sum (float64, in nats) and the mask [B, T] of the tokens that count.
    """
    teacher = _teacher(model, objective, batch)
    hidden, mask = final_hidden(model, batch)
    targets, valid = objective.targets(batch["input_ids"], mask, labels_of(batch))
    every = bool(valid.all())

    def counted(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if every else tensor[valid]

    total = chunked_objective(
        objective,
        counted(hidden),
        output_head(model),
        None if targets is None else counted(targets),
        None if teacher is None else teacher.at(valid),
    )
    return total, valid


def objective_sums(model: nn.Module, objectives: Sequence[Objective], batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Returns the result of :func:`objective_sum` for each objective, from one forward pass."""
    teachers = [_teacher(model, objective, batch) for objective in objectives]
    hidden, mask = final_hidden(model, batch)
    terms, valid, labels = [], [], labels_of(batch)
    for objective, teacher in zip(objectives, teachers, strict=True):
        targets, counted = objective.targets(batch["input_ids"], mask, labels)
        terms.append(
            Term(
                objective,
                targets=None if targets is None else targets.flatten(0, 1),
                tokens=None if bool(counted.all()) else counted.flatten(),
                teacher=None if teacher is None else teacher.at(counted),
            )
        )
        valid.append(counted)
    totals = chunked_objectives(terms, hidden.flatten(0, 1), output_head(model))
    return list(zip(totals, valid, strict=True))


def labels_of(batch: Batch) -> Tensor | None:
    """Returns the labels [B, T]; in packed rows the first token of each document is masked."""
    labels = batch.get("labels")
    if not is_packed(batch):
        return labels
    labels = batch["input_ids"] if labels is None else labels
    return labels.masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)


def final_hidden(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the final hidden states [B, T, D] and the attention mask [B, T]."""
    input_ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if is_packed(batch):
        return forward_packed(model, input_ids, batch["position_ids"], mask), mask
    unpadded = bool(mask.all())
    if not unpadded:
        _check_padding(model, mask)
    hidden: Tensor = backbone(model)(
        input_ids=input_ids,
        attention_mask=None if unpadded else mask,
        position_ids=None if unpadded else (mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return hidden, mask


def _check_padding(model: nn.Module, mask: Tensor) -> None:
    """Raises ``UnsupportedArchitectureError`` if padding on a side of ``mask`` [B, T] changes the other tokens."""
    padding = find_spec(model).padding
    if padding == "none" or (padding == "right" and not bool(mask[:, 0].all())):
        side = "on the left " if padding == "right" else ""
        remedy = "pad on the right" if padding == "right" else "use rows of one length, or batch size 1"
        raise UnsupportedArchitectureError(
            f"Padding {side}changes the states of other tokens in {class_name(model)}: {remedy}."
        )


def run_backbone(model: nn.Module, batch: Batch) -> None:
    """Runs the model without output head and gradients, for its hooks."""
    with torch.no_grad():
        final_hidden(model, batch)


def token_counts(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Returns the number of real tokens [B], and the padding mask [B, T] (True at padding), None without padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return torch.full((len(ids),), ids.shape[1], device=ids.device), None
    return mask.bool().sum(dim=1), mask == 0


def _teacher(model: nn.Module, objective: Objective, batch: Batch) -> Predictions | None:
    """Returns the predictions of the objective's teacher for a batch; None without a teacher."""

    def forward(teacher: nn.Module) -> HiddenPredictions:
        return HiddenPredictions(final_hidden(teacher, batch)[0], output_head(teacher))

    return None if objective.teacher is None else objective.teacher.predict(model, batch, forward)


def window_hidden(model: nn.Module, windows: Tensor, *, batch_size: int = 1) -> Tensor:
    """Returns the final hidden states [N, W, D] of ``windows`` [N, W], on the CPU, in the model's dtype.

    Args:
        model: A supported Hugging Face causal LM.
        windows: Token ids, int64, no padding.
        batch_size: Windows per forward pass.
    """
    device = next(model.parameters()).device
    base = backbone(model)
    parts: list[Tensor] = []
    with inference(model):
        for part in windows.split(batch_size):
            parts.append(base(input_ids=part.to(device), use_cache=False).last_hidden_state.cpu())
            steps(min(len(parts) * batch_size, len(windows)), len(windows), "window")
    return torch.cat(parts)
