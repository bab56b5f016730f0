"""Cosine allocation (SlimLLM): layers whose output is similar to their input lose more units."""

import math
from typing import Any, Literal

from hfprune.allocation.base import Allocation, Allotment, Inventory, Measurements, Scores
from hfprune.allocation.rounding import fill, round_width, slot
from hfprune.allocation.uniform import removed_units, settled
from hfprune.plan import UNIT_KINDS
from hfprune.utils.errors import ConfigError


class CosineSoftmax(Allocation):
    """Layer l of the ``num_layers`` ones with the largest cosines c loses the share r_l = r n softmax(alpha c)_l.

    n is ``num_layers`` and r the mean share; the other layers keep all units. All kinds of a layer lose the same share.
    Source: SlimLLM (Guo et al., 2025, arXiv:2505.22689), with ``share=0.25, num_layers=26, alpha=10`` on LLaMA-7B.

    Args:
        cosines: Layer -> mean over tokens of the cosine between the layer's input and output on the dense model. None:
            measured after calibration, in one forward pass over its first ``sequences`` sequences.
        alpha: Sharpness of the softmax: larger values move more of the budget to layers with large cosines.
        num_layers: n; all layers if not given. Of equal cosines, the lower layer is pruned.
        share: r. None: the r that meets the budget; a layer then loses at most all but one step of its units.
        compat: ``slimllm`` rounds r_l U as Python's ``round`` does; None to the nearest. Needs ``share``.
        sequences: Number of sequences to measure on.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> from hfprune.plan import Group
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> CosineSoftmax({0: 0.95, 1: 0.85}).allot(inventory, 160, round_to=1, scores=None).widths
        (5, 7)
    """

    def __init__(
        self,
        cosines: dict[int, float] | None = None,
        *,
        alpha: float = 10.0,
        num_layers: int | None = None,
        share: float | None = None,
        compat: Literal["slimllm"] | None = None,
        sequences: int = 16,
    ) -> None:
        if cosines is not None and not all(-1.001 <= value <= 1.001 for value in cosines.values()):
            raise ConfigError("CosineSoftmax: every cosine must be within [-1, 1].")
        if num_layers is not None and not 0 < num_layers <= (num_layers if cosines is None else len(cosines)):
            raise ConfigError(f"CosineSoftmax: num_layers={num_layers} must be from 1 to {len(cosines or ())}.")
        if sequences < 1:
            raise ConfigError(f"CosineSoftmax: sequences={sequences} must be at least 1.")
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"CosineSoftmax: share={share} is not in (0, 1).")
        if compat not in (None, "slimllm") or (compat and share is None):
            raise ConfigError(f"CosineSoftmax: compat='{compat}' must be slimllm, and needs `share`.")
        self.cosines = None if cosines is None else dict(cosines)
        self.alpha, self.share, self.compat, self.sequences = alpha, share, compat, sequences
        self.num_layers = num_layers or (None if cosines is None else len(cosines))
        self.measured = False

    @property
    def own_budget(self) -> bool:
        """Whether a share was given."""
        return self.share is not None

    @property
    def measures(self) -> str:
        """``cosines`` if none were given."""
        return "cosines" if self.cosines is None else ""

    def measure(self, on: Measurements) -> Allocation:
        """Returns the allocation with the cosines of the model's layers."""
        if self.cosines is not None:
            return self
        found = self._with(on.layer_cosines())
        found.measured, found.num_layers = True, self.num_layers  # described by the settings of the user
        return found

    def _with(self, cosines: dict[int, float]) -> "CosineSoftmax":
        return CosineSoftmax(
            cosines,
            alpha=self.alpha,
            num_layers=self.num_layers,
            share=self.share,
            compat=self.compat,
            sequences=self.sequences,
        )

    def needs_scores(self, inventory: Inventory) -> bool:
        """Returns whether widths depend on cosines, which are measured after the scores."""
        return self.cosines is None or super().needs_scores(inventory)

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` if the units are not supported or ``num_layers`` exceeds the model's layers."""
        super().check(inventory)
        if self.num_layers is not None and self.num_layers > len(inventory.layer_params) > 0:
            raise ConfigError(
                f"CosineSoftmax: num_layers={self.num_layers} must be from 1 to {len(inventory.layer_params)}."
            )

    def describe(self) -> dict[str, Any]:
        """Returns name and settings; cosines are rounded to six digits."""
        found = self._settings()
        if self.cosines is not None:
            found["cosines"] = {str(layer): round(value, 6) for layer, value in self.cosines.items()}
        return {"name": "CosineSoftmax"} | found

    def _settings(self) -> dict[str, Any]:
        settings = {"alpha": self.alpha, "num_layers": self.num_layers, "share": self.share, "compat": self.compat}
        if self.cosines is None or self.measured:
            settings["sequences"] = self.sequences
        return {name: value for name, value in settings.items() if value is not None}

    def __str__(self) -> str:
        """Returns name and settings, without measured cosines."""
        if self.cosines is None or self.measured:
            return f"CosineSoftmax({', '.join(f'{name}={value}' for name, value in self._settings().items())})"
        return super().__str__()

    def weights(self) -> dict[int, float]:
        """Returns n softmax(alpha c) of each layer, 0 for layers that are not pruned; the mean over n layers is 1."""
        cosines = self.cosines or {}
        number = self.num_layers or len(cosines)
        order = sorted(cosines, key=lambda layer: (-cosines[layer], layer))[:number]
        top = max(cosines.values())
        powers = {layer: math.exp(self.alpha * (cosines[layer] - top)) for layer in order}
        total = sum(powers.values())
        return {layer: number * powers.get(layer, 0.0) / total for layer in cosines}

    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the widths for the cosines; all layers count as equal until they are measured."""
        if self.cosines is None:
            equal = self._with(dict.fromkeys(range(len(inventory.layer_params)), 0.0))
            return equal.allot(inventory, target, round_to=round_to, scores=scores)
        layers = {group.layer for group in inventory.groups}
        if not layers <= set(self.cosines):
            missing = sorted(str(layer) for layer in layers - set(self.cosines))
            raise ConfigError(f"CosineSoftmax: no cosine for layers {', '.join(missing)}.")
        by_layer = self.weights()
        weights = [by_layer[group.layer] for group in inventory.groups if group.layer is not None]
        if self.share is not None:
            return settled(inventory, self._by_share(inventory, weights, round_to), ())
        slots = [
            slot(
                g.kind,
                g.num_units,
                cost,
                round_to=round_to if weight else g.num_units,
                floor=0.0 if weight else 1.0,
                least=g.least,
            )
            for g, cost, weight in zip(inventory.groups, inventory.costs, weights, strict=True)
        ]
        if not any(weights):
            raise ConfigError("CosineSoftmax: none of the layers chosen by the cosines may lose units.")
        largest = 1 / min(weight for weight in weights if weight)
        removal = inventory.dense_params - target
        widths = fill(
            slots, lambda x: [x * largest * w * s.units for w, s in zip(weights, slots, strict=True)], removal
        )
        return settled(inventory, widths, ())

    def _by_share(self, inventory: Inventory, weights: list[float], round_to: int) -> list[int]:
        assert self.share is not None
        widths = []
        for group, weight in zip(inventory.groups, weights, strict=True):
            share = self.share * weight
            number = removed_units(group, share, self.compat)
            if group.num_units - number < group.least:
                raise ConfigError(
                    f"{type(self).__name__} would remove {share:.0%} of {group.name}. Lower `share` or `alpha`, or "
                    "give a budget in place of `share`."
                )
            step = round_to if UNIT_KINDS[group.kind].rounded else 1
            kept = round_width(group.num_units - number, step) if number else group.num_units
            widths.append(min(max(kept, step, group.least), group.num_units))
        return widths
