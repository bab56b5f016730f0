"""A budget turned into numbers of units, and how it reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WORDS = {
    "mlp": "MLP width",
    "heads": "key-value heads",
    "block": "layers",
    "channels": "hidden size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWidths:
    """What stays of one kind of units.

    Attributes:
        kind: Unit kind.
        dense: Units per group of the dense model, of layers that stay.
        kept: Units that stay, in the same order.
    """

    kind: str
    dense: tuple[int, ...]
    kept: tuple[int, ...]

    def describe(self) -> str:
        """Returns dense and kept numbers, one where all groups have the same."""
        return f"{_WORDS.get(self.kind, self.kind)} {_listed(self.dense)} -> {_listed(self.kept)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBudget:
    """A budget turned into a kept width for every group, and what it means in parameters.

    Attributes:
        asked: The budget in the user's words.
        widths: Kept units per group; all of them for groups of layers that go as a whole.
        dense_widths: Units per group of the dense model.
        exact_width: The MLP width that meets the target before rounding; None where groups differ in width.
        dense_params: Parameters of the dense model, tied weights once.
        target_params: Parameters that were asked for.
        params: Parameters that ``widths`` gives.
        kinds: What stays by kind; empty where all groups are MLPs.
        removed_layers: Layers that go as a whole.
        provisional: Whether widths, or which layers go, wait for the scores.
        note: What limited the choice, in a few words.
    """

    asked: str
    widths: tuple[int, ...]
    dense_widths: tuple[int, ...]
    exact_width: float | None
    dense_params: int
    target_params: int
    params: int
    kinds: tuple[KindWidths, ...] = ()
    removed_layers: tuple[int, ...] = ()
    provisional: bool = False
    note: str = ""

    @property
    def by_kind(self) -> tuple[KindWidths, ...]:
        """What stays, by kind."""
        return self.kinds or (KindWidths(kind="mlp", dense=self.dense_widths, kept=self.widths),)

    @property
    def width(self) -> int | None:
        """Kept MLP width of every layer; None where layers differ, or no MLP neurons are among the units."""
        return next((common(k.kept) for k in self.by_kind if k.kind == "mlp"), None)

    @property
    def dense_width(self) -> int | None:
        """MLP width of every layer of the dense model; None as for ``width``."""
        return next((common(k.dense) for k in self.by_kind if k.kind == "mlp"), None)

    @property
    def removed_share(self) -> float:
        """Share of all parameters that goes."""
        return 1 - self.params / self.dense_params

    @property
    def removed_width_share(self) -> float | None:
        """Share of the MLP neurons, of layers that stay, that goes; None where they are no units."""
        return next((1 - sum(k.kept) / sum(k.dense) for k in self.by_kind if k.kind == "mlp"), None)

    @property
    def warning(self) -> str:
        """What has to be said loudly before anything is loaded: more than half of the parameters go. Else empty."""
        left = self.target_params if self.provisional else self.params
        if 2 * left >= self.dense_params:
            return ""
        widths = "" if self.provisional else "; " + ", ".join(k.describe() for k in self.by_kind)
        ratio = self.dense_width and self.exact_width is not None and self.asked.startswith("mlp_ratio")
        hint = " mlp_ratio is kept width / hidden size, not a share: see pruning_ratio." if ratio else ""
        return (
            f"{self.asked} removes {1 - left / self.dense_params:.1%} of the parameters, more than half: "
            f"{self.dense_params:,} -> {left:,}{widths}.{hint}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, for reports."""
        found: dict[str, Any] = {
            "asked": self.asked,
            "width": self.width,
            "dense_width": self.dense_width,
            "exact_width": self.exact_width,
            "dense_params": self.dense_params,
            "target_params": self.target_params,
            "params": self.params,
            "removed_share": self.removed_share,
            "removed_width_share": self.removed_width_share,
        }
        if self.kinds:
            found["kinds"] = {k.kind: {"dense": list(k.dense), "kept": list(k.kept)} for k in self.kinds}
            found["removed_layers"] = list(self.removed_layers)
        return found

    def describe(self) -> str:
        """Returns target and achieved, for parameters and units, in one line."""
        if self.provisional:
            return (
                f"{self.asked}: parameters {self.dense_params:,} -> about {self.target_params:,}; what each layer "
                "keeps follows from the scores"
            )
        parts = [k.describe() for k in self.by_kind]
        if self.removed_width_share is not None:
            exact = "" if self.exact_width is None else f"exact {self.exact_width:.2f}; "
            number = next(i for i, k in enumerate(self.by_kind) if k.kind == "mlp")
            parts[number] += f" ({exact}{self.removed_width_share:.2%} removed)"
        return (
            f"{self.asked}: parameters {self.dense_params:,} -> {self.params:,} (target {self.target_params:,}; "
            f"{self.removed_share:.2%} removed), {', '.join(parts)}{self.note and f'; {self.note}'}"
        )


def common(widths: Sequence[int]) -> int | None:
    """Returns the one value that all widths have, None where they differ."""
    return widths[0] if len(set(widths)) == 1 else None


def _listed(widths: Sequence[int]) -> str:
    """Returns the one number, or the smallest and the largest."""
    one = common(widths)
    return f"{min(widths)} to {max(widths)}" if one is None else str(one)
