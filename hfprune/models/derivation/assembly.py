"""Assembly of a derived table."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from hfprune.models.contexts import inference
from hfprune.models.derivation.channels import derive_stream
from hfprune.models.derivation.circuits import Circuit, find_circuits
from hfprune.models.derivation.depth import derive_depth, find_stack
from hfprune.models.derivation.heads import attention_spec, common_heads, grouped, with_counts
from hfprune.models.derivation.logits import derive_head
from hfprune.models.derivation.neurons import derive_mlps
from hfprune.models.derivation.trace import Trace
from hfprune.models.derivation.variants import Variants
from hfprune.models.groups import class_name, find_groups, pin_spec
from hfprune.models.projection import is_projection
from hfprune.models.spec import ArchSpec, AttentionSpec
from hfprune.models.surgery import apply_plan, mask_plan
from hfprune.models.twins import random_weights
from hfprune.plan import PruningPlan
from hfprune.utils.errors import HFPruneError, UnsupportedArchitectureError, first_line

_log = logging.getLogger(__name__)

_FOREIGN = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""Errors of the forward pass of a class that is written for other inputs or modules."""


def derive(model: nn.Module) -> ArchSpec:
    """Returns the architecture table of a model's class, derived from its behaviour.

    Args:
        model: A small causal LM with random weights that runs on token ids, for example a twin; it is not changed.

    Raises:
        UnsupportedArchitectureError: The class cannot be described; the message states the reason.

    Example:
        >>> from transformers import LlamaConfig
        >>> from hfprune.models.twins import twin
        >>> spec = derive(twin(LlamaConfig()))
        >>> spec.layers, spec.width_key, [s.module for s in spec.mlp]
        ('model.layers', 'intermediate_size', ['mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj'])
    """
    name = class_name(model)
    try:
        return _derived(_with_groups(model))
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{name} cannot be described: {error}.") from error
    except _FOREIGN as error:
        _log.debug("%s cannot be described", name, exc_info=True)
        raise UnsupportedArchitectureError(
            f"{name} cannot be described: it does not run as expected ({type(error).__name__}: {first_line(error)})."
        ) from error


def _derived(model: nn.Module) -> ArchSpec:
    trace, variants = Trace(model, find_stack(model)), Variants(model)
    head = derive_head(trace, variants)
    circuits = find_circuits(trace)
    depth = derive_depth(trace, variants)
    spec = ArchSpec(
        model_class=class_name(model),
        backbone=head.backbone,
        layers=trace.layers,
        mlp=(),
        width_key="",
        lm_head=head.lm_head,
        scale_key=head.scale_key,
        scale_divides=head.scale_divides,
        softcap_key=head.softcap_key,
        layers_key=depth.layers_key,
        layer_lists=depth.layer_lists,
        no_layers=depth.reason,
        lora_targets=_lora_targets(trace.stack),
    )
    spec = _with_mlp(spec, trace, circuits, variants)
    spec = _with_attention(spec, trace, circuits, variants)
    stream = derive_stream(trace, spec, variants)
    return replace(spec, no_stream=stream) if isinstance(stream, str) else replace(spec, stream=stream)


def _with_mlp(spec: ArchSpec, trace: Trace, circuits: Sequence[Sequence[Circuit]], variants: Variants) -> ArchSpec:
    """Returns a table with the first MLP whose neurons can be removed, else with the largest one."""
    found = [
        replace(spec, mlp=m.slices, no_mlp=m.reason, width_key=m.width_key, width_attributes=m.width_attributes)
        for m in derive_mlps(trace, circuits, variants)
    ]
    return next((full for full in found if full.mlp and not _fails(trace, full, "mlp")), found[0])


def _with_groups(model: nn.Module) -> nn.Module:
    """Returns a model with fewer key-value heads than query heads if the config can state them, else the model."""
    variants = Variants(model)
    changes = grouped(variants)
    if not changes:
        return model
    other: nn.Module = variants.build(changes, real=True)
    random_weights(other)
    return other


def _with_attention(
    spec: ArchSpec, trace: Trace, circuits: Sequence[Sequence[Circuit]], variants: Variants
) -> ArchSpec:
    """Returns a table with the attention, or with the reason why heads cannot be removed."""
    heads = common_heads(circuits)
    if isinstance(heads, str):
        return replace(spec, no_attention=heads)
    table = attention_spec(trace, heads, variants)
    if isinstance(table, str):
        return replace(spec, no_attention=table)
    owner, reason = trace.stack[0].get_submodule(heads.module), ""
    for attention in with_counts(table, heads, owner):
        reason = _fails(trace, replace(spec, attention=attention), "heads")
        if not reason:
            return replace(spec, attention=_least(trace, spec, attention))
    return replace(spec, no_attention=reason)


def _least(trace: Trace, spec: ArchSpec, attention: AttentionSpec) -> AttentionSpec:
    """Returns the table without the stored counts that the attention does not read."""
    for entry in attention.attributes:
        fewer = replace(attention, attributes=tuple(other for other in attention.attributes if other != entry))
        if not _fails(trace, replace(spec, attention=fewer), "heads"):
            attention = fewer
    return attention


def _fails(trace: Trace, spec: ArchSpec, kind: str) -> str:
    """Returns why a model with fewer units of a kind differs from one whose units are zero, or an empty string."""
    name = "heads" if kind == "heads" else "neurons"
    small, masked = (copy.deepcopy(trace.model) for _ in range(2))
    for model in (small, masked):
        pin_spec(model, spec)
    try:
        groups = find_groups(small, (kind,))
        keep = {group.name: _kept(group.num_units, index) for index, group in enumerate(groups)}
        plan = PruningPlan(model_class=spec.model_class, groups=groups, keep=keep, config={})
        apply_plan(small, plan)
        mask_plan(masked, plan)
        with inference(small), inference(masked):
            ours = small(input_ids=trace.ids, use_cache=False).logits
            own = masked(input_ids=trace.ids, use_cache=False).logits
    except (HFPruneError, *_FOREIGN) as error:
        return f"a model with fewer {name} does not run ({first_line(error)})"
    if bool((ours - own).abs().max() <= 1e-6 * own.abs().max()):
        return ""
    return f"a model with fewer {name} differs from one whose {name} are zero"


def _kept(units: int, layer: int) -> tuple[int, ...]:
    """Returns kept units of a layer: their number differs between layers, so that no config states it."""
    if units == 2:
        return (1,) if layer % 2 == 0 else (0, 1)
    return tuple(range(1, units - layer % 2))


def _lora_targets(layers: nn.ModuleList) -> tuple[str, ...]:
    names = [name.rpartition(".")[2] for name, module in layers.named_modules() if is_projection(module)]
    return tuple(dict.fromkeys(names))
