"""Convergence of the kept units during calibration."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfprune.allocation.base import uniform_keep
from hfprune.plan import Group
from hfprune.utils.errors import ConfigError

Select = Callable[[Mapping[str, Tensor]], Mapping[str, Sequence[int]]]
"""Scores -> kept units of every group."""


class KeptHistory:
    """The kept units at several positions of the calibration data.

    Args:
        groups: The groups.
        widths: Kept units of each; or, where widths depend on scores, a function from scores to the kept units of every
            group.
    """

    def __init__(self, groups: Sequence[Group], widths: Sequence[int] | Select) -> None:
        self._groups, self._widths = tuple(groups), widths
        self._tokens: list[int] = []
        self._kept: list[Tensor] = []  # [all units] boolean

    def add(self, tokens: int, scores: Mapping[str, Tensor]) -> float | None:
        """Records the units that ``scores`` keep after ``tokens`` tokens.

        Returns:
            The share of the kept units that were also kept at the previous position; None at the first.
        """
        kept = self._mask(scores)
        before = self._kept[-1] if self._kept else None
        self._tokens.append(tokens)
        self._kept.append(kept)
        return None if before is None else self._overlap(before, kept)

    def convergence(self, scores: Mapping[str, Tensor]) -> list[tuple[int, float]]:
        """Returns tokens and overlap of every position: the share of the units kept by ``scores`` that it kept."""
        final = self._mask(scores)
        return [(tokens, self._overlap(kept, final)) for tokens, kept in zip(self._tokens, self._kept, strict=True)]

    def _mask(self, scores: Mapping[str, Tensor]) -> Tensor:
        widths = self._widths
        keep = widths(scores) if callable(widths) else uniform_keep(scores, self._groups, widths)
        parts = []
        for group in self._groups:
            mask = torch.zeros(group.num_units, dtype=torch.bool)
            mask[list(keep[group.name])] = True
            parts.append(mask)
        return torch.cat(parts)

    def _overlap(self, one: Tensor, other: Tensor) -> float:
        """Returns the share of ``other`` that is also in ``one``."""
        return int((one & other).sum()) / int(other.sum())

    def state(self) -> dict[str, Any]:
        """Returns the history as plain data."""
        empty = torch.zeros(0, sum(g.num_units for g in self._groups), dtype=torch.bool)
        return {"tokens": list(self._tokens), "kept": torch.stack(self._kept) if self._kept else empty}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores a history from ``state``.

        Raises:
            ConfigError: The state belongs to other groups.
        """
        if state["kept"].shape[1] != sum(g.num_units for g in self._groups):
            raise ConfigError("The saved calibration history belongs to other groups.")
        self._tokens, self._kept = list(state["tokens"]), list(state["kept"])
