"""The layers of a class: their list, the config keys that follow their number, and whether they can be removed."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfprune.models.contexts import hooked, inference
from hfprune.models.derivation.trace import Trace
from hfprune.models.derivation.variants import Variants, cut_lists
from hfprune.models.layer_stream import layer_input
from hfprune.models.projection import is_projection
from hfprune.utils.errors import UnsupportedArchitectureError

_CLOSE = 1e-6


@dataclass(frozen=True, slots=True)
class Depth:
    """What a table says about the layers.

    Attributes:
        layers_key: Config key of their number, or an empty string.
        layer_lists: Config keys with one value per layer.
        reason: Why no layer can be removed, or an empty string.
    """

    layers_key: str = ""
    layer_lists: tuple[str, ...] = ()
    reason: str = ""


def find_stack(model: nn.Module) -> str:
    """Returns the name of the list of layers: the list of modules that contains most parameters.

    Raises:
        UnsupportedArchitectureError: The model has no list of modules with projections.
    """
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(_projects(layer) for layer in module)
    }
    if not sizes:
        raise UnsupportedArchitectureError("it has no list of layers (nn.ModuleList) that contain linear projections")
    largest: str = max(sizes, key=lambda name: sizes[name])
    return largest


def _projects(layer: nn.Module) -> bool:
    return any(is_projection(module) for module in layer.modules())


def derive_depth(trace: Trace, variants: Variants) -> Depth:
    """Returns the config keys of the number of layers; a model without a layer must equal one that skips it.

    Args:
        trace: Trace of the model.
        variants: Variants of the model.
    """
    count = len(trace.stack)
    lists = variants.lists(count)
    for key in variants.numbers(count):
        fewer = variants.build({key: count - 1} | cut_lists(variants.values, lists, count - 1))
        if fewer is not None and _length(fewer, trace.layers) == count - 1:
            follows = _follows(variants, key, count)
            kept = tuple(name for name in lists if name in follows)
            return Depth(key, kept, _reason(trace, variants, key, kept))
    return Depth(reason="no config key states the number of its layers")


def _follows(variants: Variants, layers_key: str, count: int) -> set[str]:
    """Returns the config lists that are as long as the model is deep, also if it has another depth."""
    found = set()
    for key in variants.lists(count):
        others = [name for name in variants.lists(count) if name != key]
        longer = {name: [*variants.values[name], variants.values[name][-1]] for name in others}
        config = variants.config({layers_key: count + 1, key: None} | longer)
        value = getattr(config, key, None)
        if config is None or value is None or len(value) == count + 1:
            found.add(key)
    return found


def _reason(trace: Trace, variants: Variants, layers_key: str, lists: tuple[str, ...]) -> str:
    """Returns why no layer can be removed, or an empty string."""
    if not trace.follows():
        return "its layers do not pass their output alone to the next layer"
    count = len(trace.stack)
    for index in range(count):
        changes = {layers_key: count - 1} | cut_lists(variants.values, lists, index)
        model = variants.build(changes)
        if model is None:
            return f"its config class refuses a model without layer {index}"
        names = _renamed(trace, index)
        own = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if {new: trace.model.state_dict()[old].shape for new, old in names.items()} != own:
            return (
                f"its config cannot describe the model without layer {index}: the kinds of layers follow their position"
            )
        if not _equal(trace, variants, changes, index):
            return f"its layers depend on their position: without layer {index} the others give other outputs"
    return ""


def _renamed(trace: Trace, removed: int) -> dict[str, str]:
    """Returns state name of the model without a layer -> state name in the whole model."""
    prefix, found = f"{trace.layers}.", {}
    for name in trace.model.state_dict():
        if not name.startswith(prefix):
            found[name] = name
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if int(index) != removed:
            found[f"{prefix}{int(index) - (int(index) > removed)}.{rest}"] = name
    return found


def _equal(trace: Trace, variants: Variants, changes: dict[str, Any], removed: int) -> bool:
    """Returns whether a model without a layer gives the logits of the model that skips it."""
    state = trace.model.state_dict()
    model = variants.build(changes, state={new: state[old] for new, old in _renamed(trace, removed).items()})
    with inference(model):
        ours: Tensor = model(input_ids=trace.ids, use_cache=False).logits
    layer = trace.stack[removed]
    with hooked([layer.register_forward_hook(_skip, with_kwargs=True)]), inference(trace.model):
        own: Tensor = trace.model(input_ids=trace.ids, use_cache=False).logits
    return bool((ours - own).abs().max() <= _CLOSE * own.abs().max())


def _skip(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = layer_input(args, kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _length(model: nn.Module, layers: str) -> int:
    stack = model.get_submodule(layers)
    return len(stack) if isinstance(stack, nn.ModuleList) else 0
