"""Recovery that leaves zeros zero: adapters and gradients act on the other weights alone.

Shape legend: O outputs, C inputs of a projection, R rank of its adapter.
"""

from typing import Any

from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from hfprune.models.projection import is_projection


class _Masked(LoraVariant):
    """A LoRA adapter whose update scale * B A is zero wherever the weight it adapts is.

    The product is formed in the forward pass, [O, C], R multiplications an entry: as much as R tokens cost.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Needs nothing."""

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
        """Returns the weight without the update: it is added where the weight was not zero, so zeros are known."""
        return orig_weight - _delta(module, active_adapter).to(orig_weight.dtype)


def _delta(module: Any, adapter: str) -> Tensor:
    """Returns the update in the layout of the adapted weight."""
    delta: Tensor = module.get_delta_weight(adapter)
    weight: Tensor = module.get_base_layer().weight
    return delta * (weight != 0)


def mask_adapters(model: nn.Module) -> None:
    """Restricts every LoRA adapter within ``model``, in place, to the weights that are not zero."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.lora_variant[adapter] = _Masked()


def hold_zeros(model: nn.Module) -> list[Any]:
    """Sets the gradients of zero weights of all trained projections to zero; returns handles that undo it.

    Adapters' own projections, one of which begins at zero, are left out.

    An optimizer whose step is zero for a weight, gradient and moments of zero leaves it zero (SGD, Adam, AdamW).
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
