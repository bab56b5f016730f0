"""The one place that knows how a projection stores its channels (``nn.Linear`` and transformers' ``Conv1D``)."""

from torch import Tensor, nn

from hfprune.errors import UnsupportedArchitectureError
from hfprune.types import Side


def is_transposed(module: nn.Module) -> bool:
    """Returns whether ``module.weight`` is [in, out] (``Conv1D``) rather than [out, in] (``nn.Linear``).

    Raises:
        UnsupportedArchitectureError: ``module`` is neither, a quantised layer for example.
    """
    if type(module) is nn.Linear:
        return False
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    raise UnsupportedArchitectureError(
        f"{type(module).__module__}.{type(module).__qualname__} is not a projection that hfprune can cut; it cuts "
        "nn.Linear and transformers' Conv1D. Load the model without quantisation and without adapters."
    )


def is_projection(module: nn.Module) -> bool:
    """Returns whether ``module`` is a linear projection that hfprune can prune."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def weight_of(module: nn.Module) -> Tensor:
    """Returns the weight of a projection as [out, in], a view."""
    transposed = is_transposed(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if transposed else weight


def num_channels(module: nn.Module, side: Side) -> int:
    """Returns the number of output or input channels of a projection."""
    return weight_of(module).shape[0 if side == "out" else 1]


def weight_axis(module: nn.Module, side: Side) -> int:
    """Returns the axis of ``module.weight``, as stored, that holds the channels of ``side``."""
    return int((side == "in") != is_transposed(module))
