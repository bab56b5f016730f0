"""The layout ``bitmask``: of each sparse matrix, the weights that are not zero and one bit per position.

Files ``bitmask-*.safetensors`` hold, for a matrix ``name`` with enough zeros, ``name.values`` (its weights that are not
zero, row by row, in the model's type) and ``name.bits`` (uint8; bit i % 8 of byte i // 8, lowest first, says whether
weight i, row by row, is there); everything else as it is. ``bitmask.json`` lists the files and the shapes. A negative
zero is a zero: it comes back without its sign.

The model in memory is the stock one, every weight in place: this saves disk and transfer, not memory or time.
Loading reads one matrix after the other. The config is of the stock class as soon as the model is there.

compressed-tensors had such a format (``sparse-bitmask``); its release 0.20 still names it, and has no code that
reads or writes it, nor has transformers 5.23.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from hfprune.io.layouts.base import LAYOUTS
from hfprune.io.layouts.custom_config import HUB, VERSION, CustomConfig, check_weights, register, stock_model
from hfprune.io.layouts.stock import StockLayout
from hfprune.utils.compat import cached_file_or_none
from hfprune.utils.errors import ConfigError

INDEX_FILE = "bitmask.json"
_ONE_BY_ONE = threading.Lock()  # transformers reads with several threads; each would hold the places of its matrix


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the values [K] of a tensor that are not zero, and one bit a place [ceil(N / 8)], uint8.

    >>> values, bits = pack(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    >>> values.tolist(), bits.tolist()
    ([2.0, 3.0], [6])
    """
    flat = weight.reshape(-1)
    there = flat != 0
    places = torch.nn.functional.pad(there, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8)
    return flat[there], (places << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(values: Tensor, bits: Tensor, shape: list[int], name: str) -> Tensor:
    """Returns the tensor that :func:`pack` was given.

    Args:
        values: [K].
        bits: [ceil(N / 8)].
        shape: Of the tensor, N numbers.
        name: Name of the tensor, for the message.

    Raises:
        ConfigError: Values, bits and shape do not belong together.
    """
    size = torch.Size(shape).numel()
    places = bits[:, None] >> torch.arange(8, dtype=torch.uint8)
    places = places.bitwise_and_(1).view(torch.bool).view(-1)
    count = int(places.count_nonzero())
    if len(bits) != -(-size // 8) or count != len(values) or bool(places[size:].any()):
        raise ConfigError(
            f"The weights of {name} are damaged: {len(values):,} values, {count:,} bits that are set, "
            f"shape {shape}. Copy the files again, or repeat the export."
        )
    return values.new_zeros(size).masked_scatter_(places[:size], values).view(shape)


def is_worth_it(weight: Tensor) -> bool:
    """Returns whether a matrix, or matrices stacked, take less space without their zeros."""
    saved = int((weight == 0).sum()) * weight.element_size()
    return weight.dim() >= 2 and weight.is_floating_point() and saved > weight.numel() / 8


def is_bitmask(folder: Path) -> bool:
    """Returns whether a folder holds a model in this layout, or parts of one."""
    return any(folder.glob("bitmask*"))


class BitmaskLayout(StockLayout):
    """``bitmask``: the uniform layout without its zeros; only ``hfprune export`` writes it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> LAYOUTS.get("bitmask").written(LlamaForCausalLM(config))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hfprune.utils.errors.ConfigError: layout='bitmask' leaves out zeros, and no matrix of this model has enough ...
    """

    name = "bitmask"
    shards = False
    by_runs = False

    def written(self, model: Any) -> Any:
        """Returns ``model``.

        Raises:
            ConfigError: No matrix has enough zeros, or a config of one value per field cannot describe the model.
        """
        self.check(model)
        if not any(is_worth_it(matrix) for matrix in _matrices(model)):
            raise ConfigError(
                "layout='bitmask' leaves out zeros, and no matrix of this model has enough of them to take less space. "
                "Prune it with a sparse method first, or use layout='uniform'."
            )
        return model

    def compress(self, folder: Path, *, file_bytes: int = 2**30) -> bool:
        """Rewrites the files of ``save_pretrained``, then the config; returns True.

        Shards are closed as they fill up: how large a packed matrix is shows only when it has been read.

        Args:
            folder: The saved model.
            file_bytes: Size in bytes at which a file, which is in memory until then, is written.
        """
        shapes: dict[str, list[int]] = {}
        parts, size = [dict[str, Tensor]()], 0
        for name, tensor in _consumed(folder):
            if size >= file_bytes:
                _flush(parts, folder)
                size = 0
            stored = _packed(name, tensor, shapes)
            parts[-1] |= stored
            size += sum(part.nbytes for part in stored.values())
        _flush(parts, folder)
        count = len(parts) - 1
        files = [f"bitmask-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        for number, file in enumerate(files, start=1):
            (folder / f"part-{number}").rename(folder / file)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        _write(folder / INDEX_FILE, {"version": VERSION, "files": files, "shapes": shapes})
        path = folder / "config.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        _write(path, _described(data, data["model_type"]))
        return True


LAYOUTS.add(BitmaskLayout.name, BitmaskLayout())


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _matrices(model: Any) -> Iterator[Tensor]:
    """Yields the matrices of a model; those that are stacked in memory may be files' tensors each, so one by one."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            yield from parameter.detach().flatten(0, -3) if parameter.dim() > 2 else (parameter.detach(),)


def _consumed(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the weight files, and deletes each file when it was read."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                yield name, tensors.get_tensor(name)
        file.unlink()


def _packed(name: str, tensor: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Returns what is stored of a tensor; notes its shape if it is packed."""
    if not is_worth_it(tensor):
        return {name: tensor}
    shapes[name] = list(tensor.shape)
    values, bits = pack(tensor)
    return {f"{name}.values": values, f"{name}.bits": bits}


def _flush(parts: list[dict[str, Tensor]], folder: Path) -> None:
    save_file(parts[-1], folder / f"part-{len(parts)}", metadata={"format": "pt"})
    parts[-1] = {}
    parts.append({})


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor on disk. Indexing reads all of it, as transformers does with the slices of a file."""

    shape: list[int]
    read: Callable[[], Tensor]

    def __getitem__(self, item: Any) -> Tensor:
        """Returns what ``tensor[item]`` is."""
        return self.read()[item]

    def get_shape(self) -> list[int]:
        """Returns the shape."""
        return self.shape


@contextmanager
def stored_tensors(path: str, **hub: Any) -> Iterator[dict[str, Stored]]:
    """Yields name -> tensor of a folder, or hub id, in this layout; nothing is read yet.

    Args:
        path: The folder or hub id.
        hub: What ``from_pretrained`` takes of the hub: ``revision``, ``token``, ``cache_dir`` and others.

    Raises:
        ConfigError: A file is missing or damaged; what is in a matrix is checked when it is read.
    """
    files, shapes = _index(path, hub)
    found: dict[str, Stored] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                tensors = stack.enter_context(safe_open(_fetched(path, file, hub), framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"'{path}': {file} is damaged: {error}. Copy it again.") from error
            names = set(tensors.keys())
            for name, shape in shapes.items():
                if {f"{name}.values", f"{name}.bits"} <= names:
                    found[name] = _sparse(tensors, name, shape)
                    names -= {f"{name}.values", f"{name}.bits"}
            found |= {name: _dense(tensors, name) for name in names}
        if missing := sorted(shapes.keys() - found.keys()):
            raise ConfigError(f"'{path}': its weight files lack {', '.join(missing[:3])}. Copy all files again.")
        yield found


def _sparse(tensors: Any, name: str, shape: list[int]) -> Stored:
    def read() -> Tensor:
        with _ONE_BY_ONE:
            return unpack(tensors.get_tensor(f"{name}.values"), tensors.get_tensor(f"{name}.bits"), shape, name)

    return Stored(shape, read)


def _dense(tensors: Any, name: str) -> Stored:
    return Stored(tensors.get_slice(name).get_shape(), lambda: tensors.get_tensor(name))


def _index(path: str, hub: Mapping[str, Any]) -> tuple[list[str], dict[str, list[int]]]:
    """Returns the names of the weight files, and the shapes of the tensors that are packed."""
    try:
        index = json.loads(_fetched(path, INDEX_FILE, hub).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{path}': {INDEX_FILE} is damaged: {error}. Copy it again.") from error
    data = index if isinstance(index, dict) else {}
    if data.get("version") != VERSION:
        raise ConfigError(f"'{path}': {INDEX_FILE} was written by another version of hfprune.")
    files, shapes = data.get("files"), data.get("shapes")
    if not (isinstance(files, list) and all(isinstance(file, str) and Path(file).name == file for file in files)):
        raise ConfigError(f"'{path}': {INDEX_FILE} is damaged: it lists no files of this folder. Copy it again.")
    if not (isinstance(shapes, dict) and all(_is_shape(shape) for shape in shapes.values())):
        raise ConfigError(f"'{path}': {INDEX_FILE} is damaged: a shape in it is no list of sizes. Copy it again.")
    return files, shapes


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)


def _fetched(path: str, file: str, hub: Mapping[str, Any]) -> Path:
    try:
        return Path(str(cached_file(path, file, **hub)))
    except OSError as error:
        raise ConfigError(f"'{path}' has no {file}. Copy all files of one export.") from error


# ---- what transformers' Auto classes call ---------------------------------------------------------------------------


class BitmaskConfig(CustomConfig):
    """What the config of a model on disk without its zeros adds to its stock config class."""

    auto_type = "hfprune_bitmask"
    adjective = "sparse"
    note = "Zeros are not stored. Load with hfprune.load(folder), or import hfprune.auto before AutoModelForCausalLM."

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        return _described(super().to_diff_dict(), self.stock.model_type)  # type: ignore[misc]


def _described(data: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns what config.json holds for a model of ``family`` whose stock config is ``data``."""
    return BitmaskConfig.described(data) | {"hfprune": BitmaskConfig.section(family)}


def bitmask_stock(config: Any) -> Any:
    """Returns a copy of a config, in its stock class where it is that of a model without its zeros."""
    found: Any = copy.deepcopy(config)
    if isinstance(found, BitmaskConfig):
        stock: Any = found.stock
        found.__class__ = stock
    return found


class BitmaskForCausalLM:
    """The entry point of ``AutoModelForCausalLM``: makes models of the stock class."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Returns the model saved at ``path``, an instance of its stock class with a stock config.

        Beside the model, one matrix is in memory at a time; where its type changes, up to four.

        Raises:
            ConfigError: A file is missing or damaged, or config and weights do not belong together.
        """
        hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        plain = bitmask_stock(config)
        kwargs |= {"config": plain, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if all(kwargs.get(key) in (None, "auto") for key in ("dtype", "torch_dtype")) and plain.dtype is None:
            raise ConfigError(f"'{path}': config.json has no dtype. Copy all files of one export, or give dtype.")
        with stored_tensors(str(path), **hub) as state:
            model, info = stock_model(plain).from_pretrained(None, *args, state_dict=state, **kwargs)
        check_weights(str(path), info, described_by="config.json")
        model.config.name_or_path = model.name_or_path = str(path)
        if model.can_generate() and kwargs.get("generation_config") is None:
            _read_generation(model, str(path), hub)
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Returns a model of the stock class with random weights; on the meta device none."""
        return stock_model(bitmask_stock(config))._from_config(bitmask_stock(config), **kwargs)


def _read_generation(model: Any, path: str, hub: dict[str, Any]) -> None:
    """Reads the generation config, which transformers reads only together with weight files of its own format."""
    if cached_file_or_none(path, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)


register(BitmaskConfig, BitmaskForCausalLM)
