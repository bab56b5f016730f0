"""The one place that knows how modules store their channels.

``nn.Linear`` holds [out, in], transformers' ``Conv1D`` and embeddings [in, out] (an embedding's inputs are tokens). A
norm multiplies every channel by one weight: it counts as a projection with one input, [out, 1].
"""

from torch import Tensor, nn

from hfprune.errors import UnsupportedArchitectureError
from hfprune.types import Side


def is_transposed(module: nn.Module) -> bool:
    """Returns whether ``module.weight`` is [in, out] (``Conv1D``, embeddings) rather than [out, in] (``nn.Linear``).

    Raises:
        UnsupportedArchitectureError: ``module`` is none of these and no norm, a quantised layer for example.
    """
    if type(module) is nn.Linear or is_norm(module):
        return False
    if isinstance(module, nn.Embedding) or is_projection(module):
        return True
    raise UnsupportedArchitectureError(
        f"{type(module).__module__}.{type(module).__qualname__} is not a projection that hfprune can cut; it cuts "
        "nn.Linear and transformers' Conv1D. Load the model without quantisation and without adapters."
    )


def is_projection(module: nn.Module) -> bool:
    """Returns whether ``module`` is a linear projection that hfprune can prune."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def is_norm(module: nn.Module) -> bool:
    """Returns whether ``module`` divides by the root mean square of its channels and weighs each of them."""
    return type(module).__name__.endswith("RMSNorm")


def weight_of(module: nn.Module) -> Tensor:
    """Returns the weight of a projection as [out, in], a view; that of a norm as [out, 1]."""
    transposed = is_transposed(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() == 1:
        return weight.unsqueeze(1)
    return weight.T if transposed else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Returns the bias [out] of a projection, None where there is none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def num_channels(module: nn.Module, side: Side) -> int:
    """Returns the number of output or input channels of a projection."""
    return weight_of(module).shape[0 if side == "out" else 1]


def weight_axis(module: nn.Module, side: Side) -> int:
    """Returns the axis of ``module.weight``, as stored, that holds the channels of ``side``."""
    return int((side == "in") != is_transposed(module))


def write_channels(module: nn.Module, side: Side) -> None:
    """Updates the attribute of a projection that repeats its number of channels, after its weight was cut."""
    if type(module) is nn.Linear:
        name = "out_features" if side == "out" else "in_features"
    elif isinstance(module, nn.Embedding):
        name = "embedding_dim" if side == "out" else "num_embeddings"
    elif is_projection(module):
        name = "nf" if side == "out" else "nx"
    else:
        return
    setattr(module, name, num_channels(module, side))
