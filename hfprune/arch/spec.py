"""What hfprune needs to know about one Hugging Face model class, as frozen data."""

from dataclasses import dataclass

from hfprune.errors import UnsupportedArchitectureError
from hfprune.registry import Registry
from hfprune.types import Side


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
class ArchSpec:
    """The table of one model class.

    Attributes:
        model_class: Exact class name; a subclass or a similar name is another architecture.
        backbone: Module that returns the final hidden states (after the last norm).
        layers: The ``nn.ModuleList`` of transformer layers.
        mlp: The sides of the MLP's projections, at least one of them ``in``.
        width_key: Config key of the MLP width; one value for all layers.
        lm_head: The output projection.
        softcap_key: Config key of the final logit soft cap, if the class has one.
        width_attributes: Attributes of a layer's modules that repeat the width, as ``module.attribute``.
        lora_targets: Names of the projections that LoRA adapts (all linear ones of a layer, as in HFPrune).
    """

    model_class: str
    backbone: str
    layers: str
    mlp: tuple[SliceTemplate, ...]
    width_key: str
    lora_targets: tuple[str, ...]
    lm_head: str = "lm_head"
    softcap_key: str | None = None
    width_attributes: tuple[str, ...] = ()


_HINT = (
    "To describe a new one: hfprune.arch.register(ArchSpec(model_class='MyForCausalLM', backbone='model', "
    "layers='model.layers', mlp=(SliceTemplate(module='mlp.up', side='out'), SliceTemplate(module='mlp.down', "
    "side='in')), width_key='intermediate_size', lora_targets=('up', 'down')))"
)

ARCHITECTURES: Registry[ArchSpec] = Registry(
    "model class", package="hfprune.arch", error=UnsupportedArchitectureError, hint=_HINT
)


def register(spec: ArchSpec) -> ArchSpec:
    """Adds an architecture and returns it; also how users describe their own."""
    return ARCHITECTURES.add(spec.model_class, spec)


GATED_MLP = (
    SliceTemplate(module="mlp.gate_proj", side="out"),
    SliceTemplate(module="mlp.up_proj", side="out"),
    SliceTemplate(module="mlp.down_proj", side="in"),
)
"""The gated MLP that most current architectures share."""

GATED_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of HFPrune's LoRA configuration."""
