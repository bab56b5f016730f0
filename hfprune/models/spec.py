"""Architecture specs: frozen dataclasses that describe a Hugging Face model class."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from hfprune.models.projection import submodule
from hfprune.plan import Side
from hfprune.utils.errors import UnsupportedArchitectureError
from hfprune.utils.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceTemplate:
    """One side of one projection of a layer's MLP.

    Attributes:
        module: Name of the projection relative to the layer.
        side: ``out`` for projections that produce the neurons, ``in`` for those that consume them.
        block: Block of a fused projection; the neurons start at channel ``block * width``.
        channels: Channels in a row that each neuron owns: 2 if gate and up alternate.
    """

    module: str
    side: Side
    block: int = 0
    channels: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTemplate:
    """One block of channels of one side of a projection of a layer's attention.

    Blocks of one projection follow each other in the order of the table. In each, a unit (a key-value head with the
    query heads that read it) owns ``(queries * query heads per unit + keys_values) * head size`` channels in a row.

    Attributes:
        module: Name of the projection relative to the layer.
        side: ``out`` for projections that produce queries, keys or values, ``in`` for those that read heads.
        queries: 1 if the block contains the query heads of a unit, else 0.
        keys_values: Number of key and value heads of a unit in the block (2 if both are interleaved).
        sizes: Attributes of the attention whose sum is the head size of this block; empty for that of the attention.
        optional: Whether some models of the class have no such projection.
    """

    module: str
    side: Side
    queries: int = 0
    keys_values: int = 0
    sizes: tuple[str, ...] = ()
    optional: bool = False


SHAPES = "(shapes)"
"""Ratio of query to key-value heads that follows from the shapes of the projections."""

Quantity = Literal["queries", "keys_values", "query_channels", "key_channels"]
"""Number of query heads, of key-value heads, of channels of all query heads, or of channels of all key heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of one model class.

    Attributes:
        module: Name of the attention relative to the layer.
        heads: Blocks of its projections, exactly one of them ``in``.
        size_attribute: Attribute of the attention with the size of a head, possibly dotted (``config.head_dim``).
        ratio_attribute: Attribute with the number of query heads per key-value head; None if it is always one,
            ``SHAPES`` if it follows from the shapes of the projections.
        heads_key: Config key of the number of query heads; empty if no config key states it.
        keys_values_key: Config key of the number of key-value heads, or None.
        size_key: Config key of the size of a head; None if it is always hidden size / heads, so that no config
            describes a model with fewer heads.
        divides_hidden: Whether the config class refuses head counts that do not divide the hidden size.
        factors_fix_heads: Whether rotary factors in the config fix the head count.
        attributes: Attributes of the attention that store head counts.
        reads_config: Whether the attention reads head counts from its config in every forward pass.
        per_head: Parameters of the attention with one number per query head (attention sinks).
    """

    module: str
    heads: tuple[HeadTemplate, ...]
    size_attribute: str = "head_dim"
    ratio_attribute: str | None = "num_key_value_groups"
    heads_key: str = "num_attention_heads"
    keys_values_key: str | None = "num_key_value_heads"
    size_key: str | None = "head_dim"
    divides_hidden: bool = False
    factors_fix_heads: bool = False
    attributes: tuple[tuple[str, Quantity], ...] = ()
    reads_config: bool = False
    per_head: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """The mixtures of experts of one model class. Layers without a router have a dense MLP.

    A layer's output is the sum of the outputs of its top-k experts, weighted by the router. A router with fewer experts
    chooses as if the removed ones had probability zero. A router that first chooses among groups of experts
    (``num_group``, ``topk_group``) keeps the number of its groups, each of equal size.

    Attributes:
        router: Name of the router relative to the layer.
        experts: Name of the module with the weights of all experts.
        count_key: Config key of the number of experts.
        chosen_key: Config key of the number of experts per token.
        attributes: Attributes of a layer's modules that store the number of experts, as ``module.attribute``.
        loss_attribute: Attribute of the model with the number of experts, for the auxiliary loss of the routers; None
            if the class has no such loss.
        loss_key: Config key that enables the auxiliary loss, a sum over all layers.
        dense_mlp: Sides of the projections of the MLPs in layers without a router.
        leading_key: Config key of the number of leading layers without a router, or None.
        dense_key: Config key with the list of the layers without a router, or None.
        step_key: Config key of the distance between layers with a router, or None; 1 where ``dense_key`` lists them.
        sparse_key: Config key with the list of the layers with a router, or None.
        interleaved: Whether the rows of gate and up alternate in ``gate_up_proj`` (gpt-oss).
        shared: Name of the shared expert whose width the config derives from that of the experts, or None.
        shared_key: Config key of the number of experts that the shared expert is as wide as; None for one.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count_key: str = "num_local_experts"
    chosen_key: str = "num_experts_per_tok"
    attributes: tuple[str, ...] = ("mlp.gate.num_experts", "mlp.experts.num_experts")
    loss_attribute: str | None = "num_experts"
    loss_key: str = "output_router_logits"
    dense_mlp: tuple[SliceTemplate, ...] = ()
    leading_key: str | None = None
    dense_key: str | None = None
    step_key: str | None = None
    sparse_key: str | None = None
    interleaved: bool = False
    shared: str | None = None
    shared_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """The modules of the residual stream other than the projections of MLP and attention. All norms are RMS norms.

    Attributes:
        embedding: Name of the token embedding.
        norms: Names of a layer's norms over hidden channels, relative to the layer.
        final_norm: Name of the norm before the output head.
        norm_offset: Constant that norms add to their weight: 1 for norms that multiply by 1 + weight (Gemma).
        scales_embedding: Whether the embedding multiplies by the square root of the hidden size (Gemma).
        hidden_key: Config key of the hidden size.
        epsilon_key: Config key of the epsilon of norms.
        attributes: Attributes of a layer's modules that store the hidden size, as ``module.attribute``.
    """

    embedding: str
    norms: tuple[str, ...]
    final_norm: str
    norm_offset: float = 0.0
    scales_embedding: bool = False
    hidden_key: str = "hidden_size"
    epsilon_key: str = "rms_norm_eps"
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SublayerSpec:
    """The attention or the MLP of a layer, as a part that can be removed whole.

    Attributes:
        modules: Names of its modules relative to the layer. The output of the last one is that of the sub-layer.
        norms: Names of the norms that act on its input or output alone, relative to the layer; they are removed with
            it.
        added: Name of the module whose output the layer adds to the residual stream; the last of ``modules`` if empty.
    """

    modules: tuple[str, ...]
    norms: tuple[str, ...]
    added: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SublayersSpec:
    """Both sub-layers of a layer of one model class.

    A layer adds the outputs of its sub-layers to the residual stream; without a sub-layer, it adds the other one's.

    Attributes:
        attention: The attention; its last module returns a tuple of the output and the attention weights.
        mlp: The MLP.
        parallel_key: Config key that, if true, makes the MLP read the input of the layer, not the stream after the
            attention.
        pre_norm_key: Config key that, if false, makes the norms act on the residual stream itself, so that no sub-layer
            can be removed.
    """

    attention: SublayerSpec
    mlp: SublayerSpec
    parallel_key: str | None = None
    pre_norm_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchSpec:
    """The architecture table of one model class.

    Attributes:
        model_class: Exact class name; subclasses and similar names are other architectures.
        backbone: Module that returns the final hidden states (after the last norm).
        layers: The ``nn.ModuleList`` of transformer layers.
        mlp: Sides of the MLP's projections, at least one of them ``in``; empty for mixture-of-experts models.
        width_key: Config key of the MLP width; one value for all layers. Empty if no config key states it.
        lm_head: The output projection.
        softcap_key: Config key of the final logit soft cap, or None.
        scale_key: Config key of the scale of the logits (Cohere's ``logit_scale``, Granite's ``logits_scaling``), or
            None.
        scale_divides: Whether logits are divided by the scale (Granite) or multiplied by it (Cohere).
        width_attributes: Attributes of a layer's modules that store the width, as ``module.attribute``.
        lora_targets: Names of the projections that LoRA adapts (all linear ones of a layer, as in HFPrune).
        attention: The attention; None if neither heads nor hidden channels can be removed.
        no_attention: Reason for this, the end of the sentence "Heads of CLASS cannot be removed: ...".
        experts: The mixture of experts, or None.
        layers_key: Config key of the number of layers.
        layer_lists: Config keys with a list of one value per layer.
        position_key: Config key that, if true, makes layers depend on their index, so that no layer can be removed.
        packing: Separation of packed documents, see :mod:`hfprune.models.forward`: ``positions`` if the class derives
            its attention mask from position ids that restart, ``mask`` if it needs an explicit mask, ``masks`` if it
            needs one for each type of layer (full and sliding attention), ``none`` if neither separates documents.
        padding: On which side of a row padding leaves the other tokens alone: ``any``, ``right`` or ``none``.
        stream: The residual stream; None if hidden channels cannot be removed.
        no_stream: Reason for this, the end of the sentence "Hidden channels of CLASS cannot be removed: ...".
        no_mlp: Reason why MLP neurons cannot be removed although the table describes them, else empty.
        no_heads: The same for heads.
        no_experts: The same for experts.
        no_layers: The same for whole layers.
        sublayers: The attention and MLP sub-layers; None if they cannot be removed.
        no_sublayers: Reason for this, the end of the sentence "The ... sub-layers of CLASS cannot be removed: ...".
        needs_bos: Whether models of the class need a BOS token before a text.
    """

    model_class: str
    backbone: str
    layers: str
    mlp: tuple[SliceTemplate, ...]
    width_key: str
    lora_targets: tuple[str, ...]
    lm_head: str = "lm_head"
    softcap_key: str | None = None
    scale_key: str | None = None
    scale_divides: bool = False
    width_attributes: tuple[str, ...] = ()
    attention: AttentionSpec | None = None
    experts: ExpertsSpec | None = None
    layers_key: str = "num_hidden_layers"
    layer_lists: tuple[str, ...] = ()
    position_key: str | None = None
    packing: Literal["positions", "mask", "masks", "none"] = "positions"
    padding: Literal["any", "right", "none"] = "any"
    stream: StreamSpec | None = None
    no_stream: str = "its table does not describe the residual stream: set ArchSpec(stream=StreamSpec(...))"
    sublayers: SublayersSpec | None = None
    no_sublayers: str = "its table does not describe them: set ArchSpec(sublayers=SublayersSpec(...))"
    no_attention: str = "its table does not describe the attention: set ArchSpec(attention=AttentionSpec(...))"
    no_mlp: str = ""
    no_heads: str = ""
    no_experts: str = ""
    no_layers: str = ""
    needs_bos: bool = False

    def find_layers(self, model: nn.Module) -> nn.ModuleList:
        """Returns the transformer layers of a model of this class."""
        layers = submodule(model, self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers


HINT = (
    "To add an architecture: hfprune.models.register(ArchSpec(model_class='MyForCausalLM', backbone='model', "
    "layers='model.layers', mlp=(SliceTemplate(module='mlp.up', side='out'), SliceTemplate(module='mlp.down', "
    "side='in')), width_key='intermediate_size', lora_targets=('up', 'down')))"
)

"""How to describe a class that cannot be derived."""

ARCHITECTURES: Registry[ArchSpec] = Registry(
    "model class", package="hfprune.models.architectures", error=UnsupportedArchitectureError, hint=HINT
)


def register(spec: ArchSpec) -> ArchSpec:
    """Registers an architecture table.

    The table is proven at first use, on a tiny model of the class: a wrong one is refused, and unit kinds whose removal
    differs from masking are refused one by one.

    Args:
        spec: The table.

    Returns:
        ``spec``.

    Raises:
        ConfigError: The class has another table already.

    Example:
        >>> from hfprune.models import ArchSpec, SliceTemplate, register
        >>> spec = ArchSpec(
        ...     model_class="MyForCausalLM",
        ...     backbone="model",
        ...     layers="model.layers",
        ...     mlp=(SliceTemplate(module="mlp.up", side="out"), SliceTemplate(module="mlp.down", side="in")),
        ...     width_key="intermediate_size",
        ...     lora_targets=("up", "down"),
        ...     no_attention="its query and key norms run over all heads",
        ... )
        >>> register(spec).model_class
        'MyForCausalLM'
        >>> ARCHITECTURES.remove("MyForCausalLM")
    """
    return ARCHITECTURES.add(spec.model_class, spec)


GATED_MLP = (
    SliceTemplate(module="mlp.gate_proj", side="out"),
    SliceTemplate(module="mlp.up_proj", side="out"),
    SliceTemplate(module="mlp.down_proj", side="in"),
)
"""Gated MLP of most current architectures."""

GATED_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of HFPrune's LoRA configuration."""

ATTENTION = AttentionSpec(
    module="self_attn",
    heads=(
        HeadTemplate(module="self_attn.q_proj", side="out", queries=1),
        HeadTemplate(module="self_attn.k_proj", side="out", keys_values=1),
        HeadTemplate(module="self_attn.v_proj", side="out", keys_values=1),
        HeadTemplate(module="self_attn.o_proj", side="in", queries=1),
    ),
)
"""Attention of most current architectures: separate projections, grouped key-value heads."""

STREAM = StreamSpec(
    embedding="model.embed_tokens",
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="model.norm",
    attributes=("hidden_size", "mlp.hidden_size"),
)
"""Residual stream of most current architectures."""

SUBLAYERS = SublayersSpec(
    attention=SublayerSpec(modules=("self_attn",), norms=("input_layernorm",)),
    mlp=SublayerSpec(modules=("mlp",), norms=("post_attention_layernorm",)),
)
"""Sub-layers of most current architectures, each with a norm on its input."""

LAYER_NORMS = (
    "its LayerNorms subtract the mean over all channels, so that no weights of a smaller model reproduce the dense "
    "model with removed channels at zero, and its class derives the size of a head from the hidden size"
)
"""Reason why hidden channels of GPT-2, GPT-NeoX and OPT cannot be removed."""
