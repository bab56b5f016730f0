"""Layout ``bitmask``: the nonzero weights of each sparse matrix, and one bit per position.

For a matrix ``name`` with enough zeros, ``bitmask-*.safetensors`` hold ``name.values`` (the nonzero weights in the
model's dtype, row-major) and ``name.bits`` (uint8; bit i % 8 of byte i // 8, least significant first, is set if weight
i is nonzero). Other tensors are stored unchanged. ``bitmask.json`` lists files and shapes. A negative zero is
read back as positive.

The loaded model is a dense stock model: the layout saves disk space and transfer, not memory or time. Matrices are
read one at a time.

compressed-tensors used to have a similar format (``sparse-bitmask``). Its release 0.20 can no longer read or write it,
and transformers 5.23 cannot either.
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
_ONE_BY_ONE = threading.Lock()  # transformers reads with several threads, each with the unpacked bits of its matrix


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nonzero values [K] of a tensor with N elements, and its bitmask [ceil(N / 8)], uint8.

    >>> values, bits = pack(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    >>> values.tolist(), bits.tolist()
    ([2.0, 3.0], [6])
    """
    flat = weight.reshape(-1)
    there = flat != 0
    places = torch.nn.functional.pad(there, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8)
    return flat[there], (places << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(values: Tensor, bits: Tensor, shape: list[int], name: str) -> Tensor:
    """Returns the original tensor of :func:`pack`.

    Args:
        values: Nonzero values [K].
        bits: Bitmask [ceil(N / 8)], uint8.
        shape: Shape of the tensor, N elements.
        name: Name of the tensor, for the message.

    Raises:
        ConfigError: Values, bits and shape are inconsistent.
    """
    size = torch.Size(shape).numel()
    places = bits[:, None] >> torch.arange(8, dtype=torch.uint8)
    places = places.bitwise_and_(1).view(torch.bool).view(-1)
    count = int(places.count_nonzero())
    if len(bits) != -(-size // 8) or count != len(values) or bool(places[size:].any()):
        raise ConfigError(
            f"The weights of {name} are damaged: {len(values):,} values, {count:,} set bits, shape {shape}. Copy the "
            "files again, or repeat the export."
        )
    return values.new_zeros(size).masked_scatter_(places[:size], values).view(shape)


def is_worth_it(weight: Tensor) -> bool:
    """Returns whether a matrix, or a stack of matrices, takes less space in this layout."""
    saved = int((weight == 0).sum()) * weight.element_size()
    return weight.dim() >= 2 and weight.is_floating_point() and saved > weight.numel() / 8


def is_bitmask(folder: Path) -> bool:
    """Returns whether a folder holds files of this layout."""
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
        """Rewrites the files of ``save_pretrained`` and the config; returns True.

        Args:
            folder: The saved model.
            file_bytes: Size in bytes at which a shard is written. Shards are collected in memory, since the size of a
                packed matrix is not known in advance.
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
    """Yields the matrices of a model; stacked matrices one by one, since files may store them separately."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            yield from parameter.detach().flatten(0, -3) if parameter.dim() > 2 else (parameter.detach(),)


def _consumed(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the weight files and deletes each file after reading it."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                yield name, tensors.get_tensor(name)
        file.unlink()


def _packed(name: str, tensor: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Returns the stored form of a tensor; adds the shape of a packed one to ``shapes``."""
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
    """Tensor on disk that is read as a whole when indexed, as transformers does with slices of a file."""

    shape: list[int]
    read: Callable[[], Tensor]

    def __getitem__(self, item: Any) -> Tensor:
        """Reads the tensor and returns ``tensor[item]``."""
        return self.read()[item]

    def get_shape(self) -> list[int]:
        """Returns the shape."""
        return self.shape


@contextmanager
def stored_tensors(path: str, **hub: Any) -> Iterator[dict[str, Stored]]:
    """Yields the tensors of a model in this layout, by name, without reading them.

    Args:
        path: The folder or hub id.
        hub: Hub arguments of ``from_pretrained``: ``revision``, ``token``, ``cache_dir`` and others.

    Raises:
        ConfigError: A file is missing or damaged. The content of a matrix is checked when it is read.
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
    """Returns the names of the weight files and the shapes of the packed tensors."""
    try:
        index = json.loads(_fetched(path, INDEX_FILE, hub).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{path}': {INDEX_FILE} is damaged: {error}. Copy it again.") from error
    data = index if isinstance(index, dict) else {}
    if data.get("version") != VERSION:
        raise ConfigError(f"'{path}': {INDEX_FILE} was written by another version of hfprune.")
    files, shapes = data.get("files"), data.get("shapes")
    if not (isinstance(files, list) and all(isinstance(file, str) and Path(file).name == file for file in files)):
        raise ConfigError(f"'{path}': {INDEX_FILE} is damaged: it has no valid list of files. Copy it again.")
    if not (isinstance(shapes, dict) and all(_is_shape(shape) for shape in shapes.values())):
        raise ConfigError(f"'{path}': {INDEX_FILE} is damaged: it contains an invalid shape. Copy it again.")
    return files, shapes


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)


def _fetched(path: str, file: str, hub: Mapping[str, Any]) -> Path:
    try:
        return Path(str(cached_file(path, file, **hub)))
    except OSError as error:
        raise ConfigError(f"'{path}' has no {file}. Copy all files of one export.") from error


# ---- entry points of transformers' Auto classes ---------------------------------------------------------------------


class BitmaskConfig(CustomConfig):
    """Additions to the stock config class for models stored in this layout."""

    auto_type = "hfprune_bitmask"
    adjective = "sparse"
    note = "Zeros are not stored. Load with hfprune.load(folder), or import hfprune.auto before AutoModelForCausalLM."

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the content of config.json."""
        return _described(super().to_diff_dict(), self.stock.model_type)  # type: ignore[misc]


def _described(data: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns the content of config.json for a model of ``family`` with the stock config ``data``."""
    return BitmaskConfig.described(data) | {"hfprune": BitmaskConfig.section(family)}


def bitmask_stock(config: Any) -> Any:
    """Returns a copy of a config; a ``BitmaskConfig`` becomes a config of its stock class."""
    found: Any = copy.deepcopy(config)
    if isinstance(found, BitmaskConfig):
        stock: Any = found.stock
        found.__class__ = stock
    return found


class BitmaskForCausalLM:
    """Entry point of ``AutoModelForCausalLM`` that returns models of the stock class."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Returns the model saved at ``path``, an instance of its stock class with a stock config.

        In addition to the model, one matrix is held in memory, or up to four if the dtype changes.

        Args:
            path: Folder or hub id.
            args: Positional arguments of transformers.
            config: Config of the saved model.
            kwargs: Keyword arguments of transformers.

        Raises:
            ConfigError: A file is missing or damaged, or config and weights are inconsistent.
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
        """Returns a model of the stock class with random weights."""
        return stock_model(bitmask_stock(config))._from_config(bitmask_stock(config), **kwargs)


def _read_generation(model: Any, path: str, hub: dict[str, Any]) -> None:
    """Reads the generation config: transformers does so only for weight files in its own format."""
    if cached_file_or_none(path, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)


register(BitmaskConfig, BitmaskForCausalLM)
