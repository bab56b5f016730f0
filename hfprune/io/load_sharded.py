"""FSDP2: a causal LM with weights sharded over the ranks, loaded, pruned and adapted one layer at a time.

Every layer is one FSDP2 unit; embeddings, final norm and head form the root unit. FSDP2 gathers the weights of a unit
only in the unit's ``forward``. Functions that read the head or run the backbone are therefore called through
:class:`WholeWeights`. A rank holds at most the full weights of one layer, or of the root unit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hfprune.io.layouts import pruned_shapes
from hfprune.io.layouts.bitmask import is_bitmask
from hfprune.io.load import load_config, read_generation_config, weight_files
from hfprune.io.loading import DTypeName, LoadingOptions
from hfprune.models.fingerprint import combine, tensor_digest
from hfprune.models.groups import class_name, find_layers, find_spec
from hfprune.models.output_head import check_head
from hfprune.models.projection import whole as whole
from hfprune.models.surgery import Cuts, cut, new_names, plan_cuts
from hfprune.plan import PruningPlan
from hfprune.recovery.lora import LoraRecovery, add_lora
from hfprune.utils.errors import ConfigError

Weights = Callable[[str], Tensor]
"""Returns the full weight of a parameter, by its name in the model without adapters."""


class WholeWeights(nn.Module):
    """Root FSDP2 unit: runs a function while embeddings, final norm and head are gathered on every rank."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns ``function(*args)``; tensors that need a gradient must be returned."""
        return function(*args)


def is_sharded(model: nn.Module) -> bool:
    """Returns whether the weights of ``model`` are sharded over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def load_sharded(
    path: str, mesh: DeviceMesh, *, dtype: DTypeName = "auto", loading: LoadingOptions | None = None
) -> tuple[Any, WholeWeights, str]:
    """Reads a saved model layer by layer; each rank keeps its shard.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        mesh: Devices over which the weights are sharded.
        dtype: Dtype of the weights; ``auto`` uses the saved dtype.
        loading: Revision, subfolder, token and others; the defaults if not given.

    Returns:
        The model, its root unit, and the fingerprint of the unsharded model.

    Raises:
        ConfigError: The weight files are not safetensors with stock names, or hold a NaN or infinity.
        UnsupportedArchitectureError: The output head of the architecture does not reproduce the model's logits.
    """
    config = load_config(path, loading=loading)
    model = _empty(config, getattr(torch, dtype) if dtype != "auto" else config.dtype)
    read_generation_config(model, path, loading=loading)
    digests: dict[str, str] = {}
    with _open_weights(path, loading, model) as read:

        def checked(name: str) -> Tensor:
            tensor = read(name)
            if not bool(tensor.isfinite().all()):
                raise ConfigError(f"path='{path}': parameter {name} holds NaN or infinity.")
            digests[name] = tensor_digest(tensor)
            return tensor

        name = class_name(model)
        root = _fill_and_shard(model, model, mesh, checked)
    root(check_head, model)
    return model, root, combine(name, digests)


def rebuild(
    model: Any,
    mesh: DeviceMesh,
    *,
    plan: PruningPlan | None = None,
    lora: LoraRecovery | None = None,
    seed: int = 0,
    merge: bool = False,
) -> tuple[Any, WholeWeights]:
    """Returns a new sharded model built layer by layer: pruned, with new adapters, or with merged adapters.

    The layers of ``model`` are freed as they are read.

    Args:
        model: A sharded model, or the PEFT model around it.
        mesh: Devices over which the weights are sharded.
        plan: Plan to apply, or None.
        lora: Adapters to add, or None.
        seed: Seed of the initial adapter weights.
        merge: Whether existing adapters are merged; otherwise they are dropped.

    Returns:
        The model (or the PEFT model around it) and its root unit.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _reshard(base)
    cuts: Cuts = plan_cuts(base, plan) if plan is not None else {}
    removed = plan.removed_layers() if plan is not None else ()
    origin = {new: old for old, new in new_names(base, plan).items()} if plan is not None else {}
    config = pruned_shapes(base, plan).config if plan is not None else base.config
    new = _empty(config, base.dtype)
    new.generation_config = base.generation_config
    old_layers = find_layers(base)
    stay = [index for index in range(len(old_layers)) if index not in removed]
    for index in removed:
        _drop(old_layers, index)
    sources = {_plain(name): parameter for name, parameter in base.named_parameters() if "lora_" not in name}
    adapters = _adapters(base) if merge else {}

    def read(name: str) -> Tensor:
        name = origin.get(name) or name
        tensor = whole(sources.pop(name)).detach()
        if name in adapters:
            tensor = tensor + _delta(adapters[name])
        return cut(tensor, cuts.get(name, ())) if name in cuts else tensor

    outer = add_lora(new, lora, seed=seed) if lora is not None else new
    root = _fill_and_shard(outer, new, mesh, read, done=lambda index: _drop(old_layers, stay[index]))
    return outer, root


def whole_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the gathered parameters of a sharded model without adapters, on the CPU; tied parameters once.

    Every rank must exhaust the iterator.
    """
    _reshard(model)
    for name, parameter in model.named_parameters():
        yield name, whole(parameter).detach().cpu()


# ---- building a model layer by layer --------------------------------------------------------------------------------


def _empty(config: Any, dtype: torch.dtype) -> Any:
    """Returns the model with its buffers; its parameters are on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # the context created a separate parameter per module
    return model


def _fill_and_shard(
    outer: nn.Module,
    base: Any,
    mesh: DeviceMesh,
    read: Weights,
    *,
    done: Callable[[int], None] = lambda index: None,
) -> WholeWeights:
    """Sets the parameters of ``base``, sharding each layer before the next is read; returns the root unit.

    Args:
        outer: ``base`` or the PEFT model around it.
        base: The Hugging Face model; all parameters but those of adapters are on the meta device.
        mesh: Devices over which the weights are sharded.
        read: Returns the value of a parameter.
        done: Called with the index of each finished layer.
    """
    spec = find_spec(base)
    layers = find_layers(base, spec)
    homes = {
        _plain(name): name for name, parameter in base.named_parameters() if parameter.is_meta
    }  # tied parameters appear once
    for index in range(len(layers)):
        prefix = f"{spec.layers}.{index}."
        for plain in [p for p in homes if p.startswith(prefix)]:
            _set(base, homes.pop(plain), read(plain))
        fully_shard(layers[index], mesh=mesh)
        done(index)
    for plain, name in homes.items():
        _set(base, name, read(plain))
    base.tie_weights()
    root = WholeWeights(outer)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    return root


def _reshard(model: nn.Module) -> None:
    """Reshards every unit, so that parameters are this rank's shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    if old.shape != value.shape:
        raise ConfigError(f"Parameter {name} has shape {list(value.shape)} where {list(old.shape)} is expected.")
    setattr(module, attribute, nn.Parameter(value.to(old.dtype).clone(), requires_grad=old.requires_grad))


def _drop(layers: nn.ModuleList, index: int) -> None:
    layers[index] = nn.Identity()


def _plain(name: str) -> str:
    """Returns the name of a parameter in the model without adapters."""
    return name.replace(".base_layer.", ".")


@contextmanager
def _open_weights(path: str, loading: LoadingOptions | None, model: Any) -> Iterator[Weights]:
    """Yields a function that reads single parameters from the model's safetensors files."""
    files = weight_files(path, loading=loading)
    if is_bitmask(files[0].parent):
        raise ConfigError(
            f"path='{path}' has layout='bitmask', which a sharded strategy cannot read. Export the model with "
            "layout='uniform' first."
        )
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    prefix = f"{model.base_model_prefix}."  # files of some base models have no prefix
    types = {name: p.dtype for name, p in model.named_parameters()}

    def read(name: str) -> Tensor:
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in where:
                with safe_open(where[key], framework="pt") as tensors:
                    tensor: Tensor = tensors.get_tensor(key).to(types[name])
                return tensor
        raise ConfigError(
            f"path='{path}': its files hold no parameter '{name}'. Save the model again with this version of "
            "transformers (save_pretrained)."
        )

    yield read


# ---- adapters -------------------------------------------------------------------------------------------------------


def _adapters(base: nn.Module) -> dict[str, Any]:
    """Returns the plain name of each adapted weight -> its PEFT layer."""
    from peft.tuners.lora import LoraLayer

    return {f"{name}.weight": module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def _delta(layer: Any) -> Tensor:
    """Returns the update alpha / r * B A of a LoRA layer, in the layout of the weight."""
    (adapter,) = layer.active_adapters
    product = whole(layer.lora_B[adapter].weight.detach()) @ whole(layer.lora_A[adapter].weight.detach())
    delta: Tensor = (product.T if layer.fan_in_fan_out else product) * layer.scaling[adapter]
    return delta
