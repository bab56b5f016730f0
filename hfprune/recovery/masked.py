"""Recovery that preserves zeros: adapters and gradients only change nonzero weights.

Shape legend: O outputs, C inputs of a projection, R rank of its adapter.
"""

from typing import Any

from torch import Tensor, nn

from hfprune.models.projection import is_projection


def mask_adapters(model: nn.Module) -> None:
    """Restricts every LoRA adapter of ``model`` to nonzero weights, in place."""
    from peft.tuners.lora.layer import LoraLayer  # takes long to import

    from hfprune.recovery.masked_lora import MaskedLora

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.lora_variant[adapter] = MaskedLora()


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
