"""Projections: how modules store their channels; no other module knows.

``nn.Linear`` holds [out, in], transformers' ``Conv1D`` and embeddings [in, out] (an embedding's inputs are tokens). A
norm multiplies every channel by one weight: it counts as a projection with one input, [out, 1]. The router of a mixture
of experts holds [experts, in]. The experts E of a layer have two weights in one module, both stacked: ``gate_up_proj``
[E, 2 I, H] counts as [E, 2 I H], since experts make its outputs, ``down_proj`` [E, H, I] as [H I, E], since they are
what it adds up.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfprune.plan import Side
from hfprune.utils.errors import UnsupportedArchitectureError

STACKED: dict[str, Side] = {"gate_up_proj": "out", "down_proj": "in"}
"""Weights of a module of experts, [E, ...] -> the side that experts are on."""


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns a module that an architecture table names; raises ``UnsupportedArchitectureError`` if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedArchitectureError(
            f"This {type(model).__name__} has no module '{name}', which its architecture table names: {error}."
        ) from error


def is_transposed(module: nn.Module) -> bool:
    """Returns whether ``module.weight`` is [in, out] (``Conv1D``, embeddings) rather than [out, in] (``nn.Linear``).

    Raises:
        UnsupportedArchitectureError: ``module`` is none of these and no norm, a quantised layer for example.
    """
    if type(module) is nn.Linear or is_norm(module) or is_router(module):
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


def is_router(module: nn.Module) -> bool:
    """Returns whether ``module`` chooses the experts of each token."""
    return type(module).__name__.endswith("TopKRouter")


def is_experts(module: nn.Module) -> bool:
    """Returns whether ``module`` holds the weights of all experts of a layer."""
    return type(module).__name__.endswith("Experts") and all(hasattr(module, name) for name in STACKED)


def weight_of(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Returns a weight of a projection as [out, in], a view; that of a norm as [out, 1]."""
    if is_experts(module):
        stacked = getattr(module, parameter).flatten(1)
        found: Tensor = stacked if STACKED[parameter] == "out" else stacked.T
        return found
    transposed = is_transposed(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() == 1:
        return weight.unsqueeze(1)
    return weight.T if transposed else weight


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor, gathered where it is sharded: every rank must call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Returns a projection's weight [out, in] without its graph, gathered where it is sharded."""
    return whole(weight_of(module, parameter).detach())


def bias_of(module: nn.Module) -> Tensor | None:
    """Returns the bias [out] of a projection, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def num_channels(module: nn.Module, side: Side, parameter: str = "weight") -> int:
    """Returns the number of output or input channels of a projection."""
    return weight_of(module, parameter).shape[0 if side == "out" else 1]


def weight_axis(module: nn.Module, side: Side) -> int:
    """Returns the axis of a projection's weight, as stored, that holds the channels of ``side``."""
    return 0 if is_experts(module) else int((side == "in") != is_transposed(module))


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
