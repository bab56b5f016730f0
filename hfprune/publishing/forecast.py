"""Forecast: size and widths of a model at several pruning ratios, from its shapes alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hfprune.allocation import ResolvedBudget
from hfprune.allocation.round_to import RoundTo, rounding
from hfprune.evaluation.size_and_speed import Size, measure_size
from hfprune.io.layouts import is_per_layer, pruned_shapes
from hfprune.models import hidden_size, mlp_widths, parameter_count
from hfprune.models.skip_layers import SkipLayers
from hfprune.plan import Budget
from hfprune.pruning.prunable import PrunableModel
from hfprune.publishing.engine_rules import facts_of, verdicts
from hfprune.publishing.engines import largest_multiple, quantised_formats, splits, width_advice
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a pruning ratio leaves of a model.

    Attributes:
        pruning_ratio: Share of all parameters to remove; 0 for the dense model.
        parameters: Parameters that are left, tied weights once.
        removed_share: Share of all parameters that is removed.
        kept: Unit kind -> units that stay, per group.
        widths: MLP width of each layer.
        exact_width: MLP width that meets the ratio exactly, before rounding; None if layers differ.
        weight_bytes: Bytes of the weights in their type.
        macs_per_token: Multiply-accumulates per token of a forward pass over ``tokens`` tokens.
        kv_cache_bytes: Bytes of keys and values of ``tokens`` tokens at batch 1.
        tokens: Tokens that the two refer to.
        multiple: Largest power of two, up to 256, that divides all MLP widths; None if the MLPs are experts.
        formats: Quantised formats whose groups fit the widths and the hidden size.
        devices: Numbers of devices (2, 4, 8) over which tensor parallelism can split the model evenly.
        provisional: Whether the units of each layer follow from scores, so that the figures are close, not exact.
        advice: What the widths prevent; empty where nothing.
        engines: Which engines load the model, see :func:`hfprune.publishing.engine_rules.verdicts`.
    """

    pruning_ratio: float = 0.0
    parameters: int
    removed_share: float
    kept: dict[str, list[int]]
    widths: list[int]
    exact_width: float | None
    weight_bytes: int
    macs_per_token: int
    kv_cache_bytes: int
    tokens: int
    multiple: int | None
    formats: list[str]
    devices: list[int]
    provisional: bool = False
    advice: str = ""
    engines: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, JSON-able."""
        return asdict(self)


def forecast(
    model: Any,
    ratios: Sequence[float],
    *,
    units: Sequence[str] = ("mlp",),
    round_to: RoundTo = 1,
    tokens: int = 1024,
    skip_layers: SkipLayers | None = None,
) -> list[Forecast]:
    """Returns the dense model's figures, and those at each pruning ratio. No weight is read.

    Args:
        model: The dense model; on the meta device it costs no memory.
        ratios: Shares of all parameters to remove, each in (0, 1).
        units: Unit kinds that are removed.
        round_to: Kept MLP widths and hidden sizes are multiples of this; ``auto`` takes the largest of 256, 128 and 64
            that misses the budget by at most 3 %.
        tokens: Length of the sequence for multiply-accumulates and the cache, shortened to the model's positions.
        skip_layers: Layers and modules that are not pruned.

    Returns:
        One entry for the dense model, then one per ratio.

    Raises:
        ConfigError: A ratio is impossible; the message gives the largest possible one.
        UnsupportedArchitectureError: The model's class is unknown, or does not have these units.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        >>> dense, pruned = forecast(model, [0.2], tokens=8)
        >>> dense.widths, pruned.widths, pruned.parameters, pruned.exact_width is not None
        ([24, 24], [14, 14], 3984, True)
    """
    subject = PrunableModel(model, units, skip_layers=skip_layers)
    subject.stock = skip_layers is None  # widths that differ between layers are saved in another layout
    budgets = [Budget(pruning_ratio=ratio, **rounding(round_to)) for ratio in ratios]
    resolved = [subject.resolve(budget) for budget in budgets]
    dense: dict[str, list[int]] = {kind: [] for kind in subject.units}
    for group in subject.groups(model):
        dense[group.kind].append(group.num_units)
    found = [_described(model, model, dense, None, tokens=tokens)]
    for budget, outcome in zip(budgets, resolved, strict=True):
        pruned = pruned_shapes(model, subject.outline(outcome))
        kept = {kind.kind: list(kind.kept) for kind in outcome.kinds}
        described = _described(pruned, model, kept, outcome, tokens=tokens)
        found.append(replace(described, pruning_ratio=float(budget.pruning_ratio or 0)))
    return found


def impossible_ratios(
    model: Any,
    ratios: Sequence[float],
    *,
    units: Sequence[str] = ("mlp",),
    round_to: RoundTo = 1,
    skip_layers: SkipLayers | None = None,
) -> dict[float, str]:
    """Returns the ratios that a model cannot be pruned by, with the reason; arguments as in :func:`forecast`."""
    subject, found = PrunableModel(model, units, skip_layers=skip_layers), {}
    subject.stock = skip_layers is None
    for ratio in ratios:
        try:
            subject.resolve(Budget(pruning_ratio=ratio, **rounding(round_to)))
        except ConfigError as error:
            found[ratio] = str(error)
    return found


def _described(
    model: Any, dense: Any, kept: dict[str, list[int]], resolved: ResolvedBudget | None, *, tokens: int
) -> Forecast:
    size: Size = measure_size(model, tokens=tokens)
    widths, hidden = list(mlp_widths(model)), hidden_size(model)
    parameters = parameter_count(model)
    return Forecast(
        parameters=parameters,
        removed_share=1 - parameters / parameter_count(dense),
        kept=kept,
        widths=widths,
        exact_width=None if resolved is None else resolved.exact_width,
        weight_bytes=size.weight_bytes,
        macs_per_token=size.macs // size.tokens,
        kv_cache_bytes=size.kv_cache_bytes,
        tokens=size.tokens,
        multiple=largest_multiple(widths) if widths else None,
        formats=quantised_formats(widths, hidden),
        devices=[] if is_per_layer(model.config) else splits(widths, _heads(model.config)),
        provisional=resolved is not None and resolved.provisional,
        advice=width_advice(widths, mlp_widths(dense)),
        engines=_engines(model, widths),
    )


def _engines(model: Any, widths: list[int]) -> dict[str, dict[str, str]]:
    """Returns which engines load the model as ``uniform`` or, where layers differ, as ``per_layer``."""
    layout = "per_layer" if is_per_layer(model.config) else "uniform"
    known = {**model.config.to_dict(), "architectures": [type(model).__name__], "auto_map": layout == "per_layer"}
    return verdicts(facts_of(known, widths, layout=layout))


def _heads(config: Any) -> list[int]:
    """Returns the numbers of query heads and of key-value heads, as far as the config states them."""
    named = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    return [number for number in named if isinstance(number, int)]
