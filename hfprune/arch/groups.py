"""From a model and its table to groups of units, their parameter cost, and the model's backbone and head."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hfprune.arch.projection import num_channels
from hfprune.arch.spec import ARCHITECTURES, ArchSpec
from hfprune.errors import UnsupportedArchitectureError
from hfprune.objectives.chunked import OutputHead
from hfprune.types import Group, Slice


def find_spec(model: nn.Module) -> ArchSpec:
    """Returns the table of ``model``'s exact class.

    Raises:
        UnsupportedArchitectureError: No table describes the class; the message lists the known ones.
    """
    return ARCHITECTURES.get(class_name(model))


def is_supported(model: nn.Module) -> bool:
    """Returns whether a table describes ``model``'s exact class."""
    return class_name(model) in ARCHITECTURES


def class_name(model: nn.Module) -> str:
    """Returns the name of ``model``'s own class, also where FSDP2 put a subclass of it in its place."""
    return next(c.__name__ for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def find_groups(model: nn.Module, spec: ArchSpec | None = None) -> tuple[Group, ...]:
    """Returns the MLP neuron groups of ``model``, one per layer, in order.

    Works on the meta device. ``spec`` defaults to the table of the model's class.

    Raises:
        UnsupportedArchitectureError: The class is unknown, or its modules are not what the table says.
    """
    spec = spec or find_spec(model)
    layers = _module(model, spec.layers)
    assert isinstance(layers, nn.ModuleList)
    return tuple(_mlp_group(model, spec, index) for index in range(len(layers)))


def _mlp_group(model: nn.Module, spec: ArchSpec, index: int) -> Group:
    layer = f"{spec.layers}.{index}"
    consumer = next(t for t in spec.mlp if t.side == "in")
    width = num_channels(_module(model, f"{layer}.{consumer.module}"), "in")
    slices = tuple(Slice(module=f"{layer}.{t.module}", side=t.side, offset=t.block * width) for t in spec.mlp)
    for s in slices:
        channels = num_channels(_module(model, s.module), s.side)
        blocks = sum(other.module == s.module and other.side == s.side for other in slices)
        if channels != blocks * width:
            raise UnsupportedArchitectureError(
                f"{s.module} of this {spec.model_class} has {channels} {s.side}-channels where its table expects "
                f"{blocks * width}; the model is not the stock architecture."
            )
    return Group(name=f"{layer}.mlp", kind="mlp", num_units=width, slices=slices)


def unit_cost(model: nn.Module, group: Group) -> int:
    """Returns how many parameters one unit of ``group`` owns (weights, and biases on the output side)."""
    cost = 0
    for s in group.slices:
        module = _module(model, s.module)
        cost += s.width * num_channels(module, "in" if s.side == "out" else "out")
        if s.side == "out" and module.bias is not None:
            cost += s.width
    return cost


def parameter_count(model: nn.Module) -> int:
    """Returns the number of parameters of ``model``; tied weights count once."""
    return sum(p.numel() for p in model.parameters())


def backbone(model: nn.Module) -> nn.Module:
    """Returns the module that maps token ids to the final hidden states."""
    return _module(model, find_spec(model).backbone)


def output_head(model: nn.Module) -> OutputHead:
    """Returns the output head of ``model`` with its soft cap, sharing the model's weights."""
    spec = find_spec(model)
    softcap = getattr(model.config, spec.softcap_key) if spec.softcap_key else None
    lm_head = _module(model, spec.lm_head)
    if not isinstance(lm_head, nn.Linear):
        raise UnsupportedArchitectureError(
            f"The output head of this {spec.model_class} is a {type(lm_head).__name__}, not an nn.Linear."
        )
    return OutputHead.of(lm_head, softcap=softcap)


def group_modules(model: nn.Module, groups: Iterable[Group]) -> dict[str, nn.Module]:
    """Returns every projection that ``groups`` mention, by name."""
    names: Sequence[str] = sorted({s.module for g in groups for s in g.slices})
    return {name: _module(model, name) for name in names}


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedArchitectureError(
            f"This {type(model).__name__} has no module '{name}', which its architecture table names: {error}."
        ) from error
