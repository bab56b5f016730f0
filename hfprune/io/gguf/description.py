"""Shapes of a model as llama.cpp needs them, and the architecture that computes them."""

from dataclasses import dataclass
from typing import Any

from hfprune.io.gguf.families import FAMILIES, PER_LAYER_ROPE, Family
from hfprune.io.gguf.rope import rope_kind, rope_settings, rotary_size
from hfprune.io.layouts.per_layer import stock_config
from hfprune.models import find_groups, find_spec
from hfprune.models.groups import attention_table, class_name, find_layers, head_shape
from hfprune.models.projection import submodule
from hfprune.plan import UnitKind
from hfprune.utils.errors import ConfigError

_PADDED = (
    "Export the model with layout='padded' first, which fills narrow layers with zeros, and then the padded folder."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Shapes of a model, and its architecture in llama.cpp.

    Attributes:
        family: The family of the model class.
        arch: Architecture in the file.
        config: Stock config, for values that all layers share.
        heads: Query heads of each layer.
        kv_heads: Key-value heads of each layer.
        widths: MLP width of each layer, or that of its experts.
        experts: Experts of each layer, 0 without.
        head_size: Size of a head.
        hidden: Size of the residual stream.
        vocabulary: Rows of the token embedding.
        tied: Whether the output head is the token embedding.
    """

    family: Family
    arch: str
    config: Any
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    experts: tuple[int, ...]
    head_size: int
    hidden: int
    vocabulary: int
    tied: bool

    @property
    def per_layer(self) -> bool:
        """Whether the architecture has hyperparameters per layer."""
        return self.arch in PER_LAYER_ROPE

    def window(self) -> int | None:
        """Returns the sliding window that layers of the model use, None if all attend to everything."""
        kinds, size = getattr(self.config, "layer_types", None), getattr(self.config, "sliding_window", None)
        if not size or (kinds is not None and "sliding_attention" not in kinds):
            return None
        return int(size)


def describe(model: Any) -> Description:
    """Returns the shapes of a model and the architecture of llama.cpp that computes it.

    Args:
        model: A Hugging Face model, on any device; only shapes and the config are read.

    Raises:
        ConfigError: No architecture of llama.cpp computes this model.
        UnsupportedArchitectureError: hfprune does not support the class.
    """
    name = class_name(model)
    if name not in FAMILIES:
        raise ConfigError(
            f"{name} cannot be written as GGUF: llama.cpp has no architecture for it, or hfprune has no table of its "
            f"tensors. Known: {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[name]
    shape = _shapes(model)
    config = stock_config(model.config)
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shape |= {"hidden": hidden, "vocabulary": vocabulary, "tied": tied, "config": config, "family": family}
    found = Description(arch=family.arch, **shape)
    reason = _not_uniform(found)
    if reason is None:
        _check_family(found, name)
        return found
    found = Description(arch=_per_layer_arch(found, name, reason), **shape)
    _check_family(found, name)
    return found


def _shapes(model: Any) -> dict[str, Any]:
    """Returns heads, widths and experts of each layer, and the size of a head."""
    spec, layers = find_spec(model), find_layers(model)
    table = attention_table(spec)
    inner: UnitKind = "mlp" if spec.experts is None else "experts"
    groups = {(group.kind, group.layer): group for group in find_groups(model, (inner, "heads"))}
    widths, heads, kv_heads, experts, sizes = [], [], [], [], set()
    for index, layer in enumerate(layers):
        mlp, attention = groups.get((inner, index)), groups.get(("heads", index))
        if mlp is None or attention is None:
            raise ConfigError(
                f"Layer {index} has no {'MLP' if mlp is None else 'attention'}, which GGUF cannot state. Remove whole "
                "layers, or widths and heads."
            )
        size, ratio = head_shape(submodule(layer, table.module), table)
        stacked = None if spec.experts is None else layer.get_submodule(spec.experts.experts)
        widths.append(mlp.num_units if stacked is None else stacked.get_parameter("down_proj").shape[-1])
        experts.append(0 if stacked is None else mlp.num_units)
        kv_heads.append(attention.num_units)
        heads.append(attention.num_units * ratio)
        sizes.add(size)
    (size,) = sizes
    lists = {"heads": heads, "kv_heads": kv_heads, "widths": widths, "experts": experts}
    return {key: tuple(values) for key, values in lists.items()} | {"head_size": size}


def _not_uniform(found: Description) -> str | None:
    """Returns why the family's own architecture cannot state the shapes, or None if it can."""
    for what, values in (
        ("MLP width", found.widths),
        ("number of experts", found.experts),
        ("number of heads", found.heads),
        ("number of key-value heads", found.kv_heads),
    ):
        if len(set(values)) > 1:
            return f"has one {what} for all layers, and those of the model have {min(values)} to {max(values)}"
    if found.family.full_heads and found.heads[0] * found.head_size != found.hidden:
        return (
            f"needs heads that fill the hidden size, and {found.heads[0]} heads of size {found.head_size} do not fill "
            f"{found.hidden}"
        )
    return None


def _per_layer_arch(found: Description, name: str, reason: str) -> str:
    """Returns the architecture with hyperparameters per layer; raises ``ConfigError`` if none computes the model."""
    family, target = found.family, found.family.per_layer
    start = f"{name} cannot be written as GGUF: llama.cpp's architecture '{family.arch}' {reason}"
    if len(set(found.experts)) > 1:
        raise ConfigError(f"{start}. Keep the same number of experts in every layer.")
    if target is None:
        raise ConfigError(f"{start}. No architecture with values per layer computes this class. {_PADDED}")
    problem = None
    if target == "openelm" and not found.tied:
        problem = "has no separate output head, and the model's head is not tied to the embedding"
    elif target == "openelm" and getattr(found.config, "attention_bias", False):
        problem = "has no biases, and the attention of the model has"
    elif rotary_size(found.config, found.head_size) != found.head_size:
        problem = "rotates all channels of a head, and the model only a part of them"
    elif (kind := rope_kind(found.config)) not in PER_LAYER_ROPE[target]:
        problem = f"does not state the rotary scaling '{kind}'"
    if problem is not None:
        raise ConfigError(f"{start}. The architecture with values per layer, '{target}', {problem}. {_PADDED}")
    return target


def _check_family(found: Description, name: str) -> None:
    """Raises ``ConfigError`` for settings of the config that the architecture does not compute."""
    problem = _activation(found) or _rotary(found) or _attention(found)
    if problem is not None:
        raise ConfigError(f"{name} cannot be written as GGUF: llama.cpp's architecture '{found.arch}' {problem}.")


def _activation(found: Description) -> str | None:
    config = found.config
    keys = ("hidden_activation", "hidden_act", "activation_function")
    used = next((getattr(config, key) for key in keys if getattr(config, key, None) is not None), None)
    if used not in found.family.activations:
        return f"computes the activation {', '.join(sorted(found.family.activations))}, the model uses '{used}'"
    return None


def _rotary(found: Description) -> str | None:
    kind, known = rope_kind(found.config), PER_LAYER_ROPE.get(found.arch, found.family.rope)
    if kind not in known:
        return f"does not state the rotary scaling '{kind}' (known: {', '.join(sorted(known))})"
    settings = rope_settings(found.config)
    if kind == "yarn":
        own = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
        changed = [key for key, value in own.items() if settings.get(key) not in (None, value)]
        if changed:
            return f"does not read {', '.join(changed)} of YaRN"
    if rotary_size(found.config, found.head_size) % 2:
        return f"rotates pairs of channels, the model {rotary_size(found.config, found.head_size)} channels of a head"
    whole = found.arch in ("llama", "deci", "openelm", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
    if whole and rotary_size(found.config, found.head_size) != found.head_size:
        return "rotates all channels of a head, and the model only a part of them"
    if found.arch == "gemma3" and found.window() is not None:
        local = (found.config.rope_parameters.get("sliding_attention") or {}).get("rope_type", "default")
        if local != "default":
            return f"does not state the rotary scaling '{local}' of layers with a sliding window"
    return None


def _attention(found: Description) -> str | None:
    config = found.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        return "scales attention by the size of a head alone"
    if found.arch.startswith("gemma") and found.arch != "gemma":
        scalar, large = config.query_pre_attn_scalar, {"gemma2": 46, "gemma3": 62}[found.arch]
        own = found.hidden // found.heads[0] if len(found.widths) == large else found.head_size
        if scalar != own:
            return f"scales attention by {own} ** -0.5, the model by {scalar} ** -0.5 (query_pre_attn_scalar)"
        caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
        if found.arch == "gemma2" and None in caps:
            return "has soft caps of attention and logits, and the model has not"
        if found.arch == "gemma3" and caps[0] is not None:
            return "has no soft cap of attention"
        if getattr(config, "use_bidirectional_attention", False):
            return "has causal attention only"
    normed = getattr(config, "norm_topk_prob", found.family.normed)
    if found.family.normed is not None and normed != found.family.normed:
        return f"weights experts with norm_topk_prob={found.family.normed}, the model with {normed}"
    if found.family.untied and found.tied:
        return "needs a separate output head, and the model's head is tied to the embedding"
    if found.family.tied and not found.tied:
        return "has no separate output head, and the model's head is not tied to the embedding"
    return None
