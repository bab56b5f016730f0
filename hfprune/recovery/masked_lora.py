"""LoRA variant that preserves zeros. PEFT is imported with this module, and only runs with adapters need it.

Shape legend: O outputs, C inputs of a projection, R rank of its adapter.
"""

from typing import Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor


class MaskedLora(LoraVariant):
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
