"""Projections: access to the channels of modules, independent of how they store their weights.

``nn.Linear`` stores [out, in]; ``Conv1D`` of transformers and embeddings store [in, out] (the inputs of an embedding
are tokens). A norm has one weight per channel and is treated as a projection with one input, [out, 1]. The router of a
mixture of experts stores [experts, in]. The E experts of a layer share a module with two stacked weights:
``gate_up_proj`` [E, 2 I, H] is treated as [E, 2 I H], with experts as outputs, and ``down_proj`` [E, H, I] as [H I, E],
with experts as inputs. ``gate_up_proj.3`` is the matrix [2 I, H] of expert 3, ``down_proj.3`` its matrix [H, I]. Some
classes (gpt-oss, Llama 4) store the last two axes the other way round. Other parameters and buffers (biases, the
correction bias of a router) are read as [channels, rest].
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfprune.plan import Side
from hfprune.utils.errors import UnsupportedArchitectureError

STACKED: dict[str, Side] = {"gate_up_proj": "out", "down_proj": "in"}
"""Stacked weights [E, ...] of an experts module -> side of the experts."""

_ROUTER = re.compile(r"(Top[kK])?Router$")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns a module named by an architecture table; raises ``UnsupportedArchitectureError`` if it is missing."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedArchitectureError(
            f"This {type(model).__name__} has no module '{name}', which its architecture table names: {error}."
        ) from error


def set_attribute(root: nn.Module, path: str, value: Any) -> None:
    """Sets an attribute of a submodule, given as ``module.attribute``."""
    owner, _, attribute = path.rpartition(".")
    setattr(root.get_submodule(owner), attribute, value)


def is_transposed(module: nn.Module) -> bool:
    """Returns whether ``module.weight`` is [in, out] (``Conv1D``, embeddings) rather than [out, in] (``nn.Linear``).

    Raises:
        UnsupportedArchitectureError: The module is not supported, for example a quantised layer.
    """
    if is_linear(module) or is_norm(module) or is_router(module):
        return False
    if isinstance(module, nn.Embedding) or is_projection(module):
        return True
    raise UnsupportedArchitectureError(
        f"{type(module).__module__}.{type(module).__qualname__} is not supported; supported projections are "
        "nn.Linear and transformers' Conv1D. Load the model without quantisation and without adapters."
    )


def is_projection(module: nn.Module) -> bool:
    """Returns whether ``module`` is a linear projection that hfprune can prune."""
    return is_linear(module) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def is_linear(module: nn.Module) -> bool:
    """Returns whether ``module`` is an ``nn.Linear``, or a subclass of it that a model's own file defines (Falcon)."""
    kind = type(module)
    if kind is nn.Linear:
        return True
    own = kind.__module__.rpartition(".")[2].startswith("modeling_") and not kind.__name__.endswith("Router")
    return isinstance(module, nn.Linear) and own


def is_norm(module: nn.Module) -> bool:
    """Returns whether ``module`` is an RMS norm."""
    return type(module).__name__.endswith("RMSNorm")


def is_router(module: nn.Module) -> bool:
    """Returns whether ``module`` is the router of a mixture of experts."""
    return _ROUTER.search(type(module).__name__) is not None


def is_experts(module: nn.Module) -> bool:
    """Returns whether ``module`` contains the stacked weights of all experts of a layer."""
    return type(module).__name__.endswith("Experts") and all(hasattr(module, name) for name in STACKED)


def stores_inputs_first(experts: Any) -> bool:
    """Returns whether an experts module stores [E, H, 2 I] and [E, I, H] (gpt-oss, Llama 4), not [E, 2 I, H]."""
    return bool(experts.gate_up_proj.shape[1] != 2 * experts.down_proj.shape[2])


def tensor_of(module: nn.Module, parameter: str) -> Tensor:
    """Returns a view of a parameter or buffer of a module as stored; ``name.3`` is its part 3 along the first axis."""
    name, _, part = parameter.partition(".")
    found: Tensor = getattr(module, name)
    return found[int(part)] if part else found


def weight_of(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Returns a view of a projection's weight as [out, in] ([out, 1] for norms).

    Args:
        module: The projection.
        parameter: Name of the weight; experts modules have several. ``gate_up_proj.3`` is the matrix of expert 3.
    """
    name, _, part = parameter.partition(".")
    if name in STACKED and is_experts(module):
        stored = tensor_of(module, parameter)
        if part:
            return stored.T if stores_inputs_first(module) else stored
        return stored.flatten(1) if STACKED[name] == "out" else stored.flatten(1).T
    if parameter != "weight":
        other = tensor_of(module, parameter)
        return other.flatten(1) if other.dim() > 1 else other.unsqueeze(1)
    transposed = is_transposed(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() == 1:
        return weight.unsqueeze(1)
    return weight.T if transposed else weight


def whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor, gathered if it is sharded. Collective when the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Returns a projection's detached weight [out, in], gathered if it is sharded. Collective when it is sharded."""
    return whole(weight_of(module, parameter).detach())


def bias_of(module: nn.Module) -> Tensor | None:
    """Returns the bias [out] of a projection, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def num_channels(module: nn.Module, side: Side, parameter: str = "weight") -> int:
    """Returns the number of output or input channels of a projection."""
    return weight_of(module, parameter).shape[0 if side == "out" else 1]


def weight_axis(module: nn.Module, side: Side, parameter: str = "weight") -> int:
    """Returns the axis of a projection's stored weight that contains the channels of ``side``.

    For the part of one expert (``gate_up_proj.3``), it is an axis of the stacked weight, 1 or 2.
    """
    name, _, part = parameter.partition(".")
    if name in STACKED and is_experts(module):
        return 1 + int((side == "in") != stores_inputs_first(module)) if part else 0
    if parameter != "weight":
        return int(bool(part))
    return int((side == "in") != is_transposed(module))


def zero_channels(module: nn.Module, parameter: str, side: Side, channels: list[int]) -> None:
    """Sets channels of a weight, and of its bias on the output side, to zero in place."""
    weight, axis = tensor_of(module, parameter), weight_axis(module, side, parameter)
    where = torch.tensor(channels, device=weight.device)
    weight.index_fill_(axis - int("." in parameter), where, 0.0)
    bias = bias_of(module) if parameter == "weight" else None
    if side == "out" and bias is not None:
        bias[where] = 0.0


def write_channels(module: nn.Module, side: Side) -> None:
    """Updates the attribute of a projection that stores its number of channels, after its weight was cut."""
    if isinstance(module, nn.Linear):
        name = "out_features" if side == "out" else "in_features"
    elif isinstance(module, nn.Embedding):
        name = "embedding_dim" if side == "out" else "num_embeddings"
    elif is_projection(module):
        name = "nf" if side == "out" else "nx"
    else:
        return
    setattr(module, name, num_channels(module, side))
