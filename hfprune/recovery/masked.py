"""Recovery that preserves zeros: adapters and gradients only change nonzero weights.

Shape legend: O outputs, C inputs of a projection, R rank of its adapter.
"""

from typing import Any

from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from hfprune.models.projection import is_projection


class _Masked(LoraVariant):
    """LoRA variant whose update scale * B A is zero where the adapted weight is zero.

    The forward pass computes the product [O, C], which costs as much as R tokens.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Does nothing: the variant has no parameters."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the projection's output plus the adapter's."""
        delta = _delta(module, active_adapter)
        if not module.fan_in_fan_out:
            delta = delta.T
        update: Tensor = module.lora_dropout[active_adapter](x) @ delta.to(x.dtype)
        return result + update

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight with the update."""
        return orig_weight + _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Adds the update to the weight."""
        orig_weight.data += _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight without the update, whose zeros are those of the merged weight."""
        return orig_weight - _delta(module, active_adapter).to(orig_weight.dtype)


def _delta(module: Any, adapter: str) -> Tensor:
    """Returns the update in the layout of the adapted weight."""
    delta: Tensor = module.get_delta_weight(adapter)
    weight: Tensor = module.get_base_layer().weight
    return delta * (weight != 0)


def mask_adapters(model: nn.Module) -> None:
    """Restricts every LoRA adapter of ``model`` to nonzero weights, in place."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.lora_variant[adapter] = _Masked()


def hold_zeros(model: nn.Module) -> list[Any]:
    """Masks the gradients of zero weights in all trained projections; returns the handles of the hooks.

    Optimizers such as SGD, Adam and AdamW do not change a zero weight without a gradient. The projections of adapters,
    which start at zero, are not masked.

    Args:
        model: The sparse model.
    """

    def held(weight: Tensor) -> Any:
        return weight.register_hook(lambda grad: grad.masked_fill(weight.detach() == 0, 0.0))

    projections = {name: m.weight for name, m in model.named_modules() if is_projection(m) and "lora_" not in name}
    trained = [
        weight
        for weight in projections.values()
        if isinstance(weight, nn.Parameter) and weight.requires_grad and bool((weight.detach() == 0).any())
    ]
    return [held(weight) for weight in trained]
