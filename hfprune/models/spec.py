"""Architecture specs: what hfprune needs to know about a Hugging Face model class, as frozen data."""

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
        side: ``out`` where the neurons are produced, ``in`` where they are consumed.
        block: Which block of a fused projection: the neurons start at channel ``block * width``.
    """

    module: str
    side: Side
    block: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTemplate:
    """One block of channels of one side of a projection of a layer's attention.

    Blocks of one projection follow each other in the order of the table. In each, a unit (a key-value head with the
    query heads that read it) owns ``(queries * query heads per unit + keys_values) * head size`` channels in a row.

    Attributes:
        module: Name of the projection relative to the layer.
        side: ``out`` where queries, keys or values are produced, ``in`` where heads are read.
        queries: 1 where the block holds the unit's query heads, else 0.
        keys_values: How many of the unit's key and value heads the block holds (2 where both are interleaved).
    """

    module: str
    side: Side
    queries: int = 0
    keys_values: int = 0


Quantity = Literal["queries", "keys_values", "query_channels"]
"""Number of query heads, of key-value heads, of channels of all query heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of one model class.

    Attributes:
        module: Name of the attention relative to the layer.
        heads: The blocks of its projections, exactly one of them ``in``.
        size_attribute: Attribute of the attention that holds the size of a head.
        ratio_attribute: Attribute that holds the number of query heads per key-value head; None: always one.
        heads_key: Config key of the number of query heads.
        keys_values_key: Config key of the number of key-value heads; None where there is none.
        size_key: Config key from which the class takes the size of a head; None where it is always hidden size / heads,
            so that no config describes a model with fewer heads.
        divides_hidden: Whether the config class refuses head counts that do not divide the hidden size.
        factors_fix_heads: Whether the config class ties rotary factors, where it has some, to the head count.
        attributes: Attributes of the attention that repeat head counts.
        reads_config: Whether the attention reads head counts from its config whenever it runs.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """The mixture of experts in every layer of one model class.

    The router multiplies what each of its best experts gives by a weight and adds that up. A router that knows fewer
    experts chooses among those, as if the others had a probability of zero.

    Attributes:
        router: The router, relative to the layer.
        experts: The module that holds the weights of all experts.
        count_key: Config key of the number of experts.
        chosen_key: Config key of the number of experts that a token goes through.
        attributes: Attributes of a layer's modules that repeat the number of experts, as ``module.attribute``.
        loss_attribute: Attribute of the model that repeats it, for the routers' auxiliary loss.
        loss_key: Config key that turns this loss on, in which all layers are one sum.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count_key: str = "num_local_experts"
    chosen_key: str = "num_experts_per_tok"
    attributes: tuple[str, ...] = ("mlp.gate.num_experts", "mlp.experts.num_experts")
    loss_attribute: str = "num_experts"
    loss_key: str = "output_router_logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What carries the residual stream, besides the projections of MLP and attention that read and write it.

    All norms divide by the root mean square of their channels.

    Attributes:
        embedding: The token embedding.
        norms: The norms of a layer that run over hidden channels, relative to the layer.
        final_norm: The norm before the output head.
        norm_offset: What a norm adds to its weight: 1 where it multiplies by 1 + weight (Gemma).
        scales_embedding: Whether the embedding multiplies by the square root of the hidden size (Gemma).
        hidden_key: Config key of the hidden size.
        epsilon_key: Config key of the norms' epsilon.
        attributes: Attributes of a layer's modules that repeat the hidden size, as ``module.attribute``.
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
class ArchSpec:
    """The table of one model class.

    Attributes:
        model_class: Exact class name; a subclass or a similar name is another architecture.
        backbone: Module that returns the final hidden states (after the last norm).
        layers: The ``nn.ModuleList`` of transformer layers.
        mlp: The sides of the MLP's projections, at least one of them ``in``; empty for mixture-of-experts models.
        width_key: Config key of the MLP width; one value for all layers.
        lm_head: The output projection.
        softcap_key: Config key of the final logit soft cap, if the class has one.
        scale_key: Config key of a number that scales the logits, if the class has one (Cohere's ``logit_scale``,
            Granite's ``logits_scaling``).
        scale_divides: Whether logits are divided by that number (Granite), not multiplied (Cohere).
        width_attributes: Attributes of a layer's modules that repeat the width, as ``module.attribute``.
        lora_targets: Names of the projections that LoRA adapts (all linear ones of a layer, as in HFPrune).
        attention: The attention; None where neither heads nor hidden channels can be removed.
        no_attention: Why they cannot; completes the sentence "Heads of CLASS cannot be removed: ...".
        experts: The mixture of experts; None where there is none.
        layers_key: Config key of the number of layers.
        layer_lists: Config keys with a list of one value per layer.
        position_key: Config key that, when true, makes a layer depend on its index: no layer can go then.
        packing: What keeps documents packed into one row apart, see :mod:`hfprune.models.forward`: ``positions``, where
            the class makes its attention mask from position ids that start again; ``mask``, where it has to be given
            one.
        stream: The residual stream; None where hidden channels cannot be removed.
        no_stream: Why they cannot; completes the sentence "Hidden channels of CLASS cannot be removed: ...".
        needs_bos: Whether models of the class predict badly without BOS before a text.
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
    packing: Literal["positions", "mask"] = "positions"
    stream: StreamSpec | None = None
    no_stream: str = "its table does not say what carries the residual stream: give ArchSpec(stream=StreamSpec(...))"
    no_attention: str = "its table does not describe the attention: give ArchSpec(attention=AttentionSpec(...))"
    needs_bos: bool = False

    def find_layers(self, model: nn.Module) -> nn.ModuleList:
        """Returns the transformer layers of a model of this class."""
        layers = submodule(model, self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers


_HINT = (
    "To describe a new one: hfprune.models.register(ArchSpec(model_class='MyForCausalLM', backbone='model', "
    "layers='model.layers', mlp=(SliceTemplate(module='mlp.up', side='out'), SliceTemplate(module='mlp.down', "
    "side='in')), width_key='intermediate_size', lora_targets=('up', 'down')))"
)

ARCHITECTURES: Registry[ArchSpec] = Registry(
    "model class", package="hfprune.models.architectures", error=UnsupportedArchitectureError, hint=_HINT
)


def register(spec: ArchSpec) -> ArchSpec:
    """Adds an architecture, one of your own for example.

    The table is compared with the model when it is used: shapes with the projections that it names, the output head
    with the model's logits.

    Args:
        spec: The table.

    Returns:
        ``spec``.

    Raises:
        ConfigError: Another table was registered for the class.

    Example:
        >>> from hfprune.models import ArchSpec, SliceTemplate, register
        >>> spec = ArchSpec(
        ...     model_class="MyForCausalLM",
        ...     backbone="model",
        ...     layers="model.layers",
        ...     mlp=(SliceTemplate(module="mlp.up", side="out"), SliceTemplate(module="mlp.down", side="in")),
        ...     width_key="intermediate_size",
        ...     lora_targets=("up", "down"),
        ...     no_attention="its norms of queries and keys run over all heads",
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
"""The gated MLP that most current architectures share."""

GATED_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of HFPrune's LoRA configuration."""

ATTENTION = AttentionSpec(
    module="self_attn",
    heads=(
        HeadTemplate(module="self_attn.q_proj", side="out", queries=1),
        HeadTemplate(module="self_attn.k_proj", side="out", keys_values=1),
        HeadTemplate(module="self_attn.v_proj", side="out", keys_values=1),
        HeadTemplate(module="self_attn.o_proj", side="in", queries=1),
    ),
)
"""The attention that most current architectures share: separate projections, grouped key-value heads."""

STREAM = StreamSpec(
    embedding="model.embed_tokens",
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="model.norm",
    attributes=("hidden_size", "mlp.hidden_size"),
)
"""The residual stream that most current architectures share."""

LAYER_NORMS = (
    "its LayerNorms subtract the mean over all channels, so no weights make a model without some of them equal to the "
    "dense one with these at zero, and its class takes the size of a head from the hidden size"
)
"""Why the residual stream of GPT-2, GPT-NeoX and OPT keeps its channels."""
