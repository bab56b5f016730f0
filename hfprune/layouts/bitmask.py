"""A sparse model in less space: of each sparse matrix, the weights that are not zero and one bit for every place.

Files ``bitmask-*.safetensors`` hold, for a matrix ``name`` with enough zeros, ``name.values`` (its weights that are not
zero, row by row, in the model's type) and ``name.bits`` (uint8; bit i % 8 of byte i // 8, lowest first, says whether
weight i, row by row, is there); everything else as it is. ``bitmask.json`` lists the files and the shapes. The model in
memory is the stock one, every weight in place: this saves disk and transfer, not memory or time.

compressed-tensors had such a format (``sparse-bitmask``); its release 0.20 still names it, and has no code that
reads or writes it, nor has transformers 5.23.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.hub import cached_file

from hfprune.errors import ConfigError
from hfprune.layouts.base import LAYOUTS
from hfprune.layouts.uniform import Uniform

MODEL_TYPE = "hfprune_bitmask"
"""``model_type`` in config.json: software that does not know hfprune stops there, with this name in its message."""

INDEX_FILE = "bitmask.json"
_VERSION = 1
_NOTE = "Zeros are not stored. Load with hfprune.load(folder), or import hfprune.auto before AutoModelForCausalLM."


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
        name: What it is called, for the message.

    Raises:
        ConfigError: Values, bits and shape do not belong together.
    """
    size = torch.Size(shape).numel()
    places = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1).bool()
    if len(bits) != -(-size // 8) or int(places.sum()) != len(values) or bool(places[size:].any()):
        raise ConfigError(
            f"The weights of {name} are damaged: {len(values):,} values, {int(places.sum()):,} bits that are set, "
            f"shape {shape}. Copy the files again, or export the model anew."
        )
    flat = values.new_zeros(size)
    flat[places[:size]] = values
    return flat.view(shape)


def is_worth_it(weight: Tensor) -> bool:
    """Returns whether a matrix takes less space without its zeros."""
    saved = int((weight == 0).sum()) * weight.element_size()
    return weight.dim() == 2 and weight.is_floating_point() and saved > weight.numel() / 8


class Bitmask(Uniform):
    """The uniform layout, zeros left out."""

    name = "bitmask"
    shards = False

    def written(self, model: Any) -> Any:
        """Returns ``model``.

        Raises:
            ConfigError: No matrix has enough zeros, or a config of one value per field cannot describe the model.
        """
        self.check(model)
        if not any(is_worth_it(parameter.detach()) for parameter in model.parameters()):
            raise ConfigError(
                "--layout bitmask leaves out zeros, and no matrix of this model has enough of them to take less space. "
                "Prune it with --method and --sparsity first, or give --layout uniform."
            )
        return model

    def compress(self, folder: Path) -> bool:
        """Rewrites what ``save_pretrained`` wrote: one file after the other, then the config; returns True."""
        files = sorted(folder.glob("*.safetensors"))
        shapes: dict[str, list[int]] = {}
        for number, file in enumerate(files, start=1):
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                stored = dict(_packed(((name, tensors.get_tensor(name)) for name in names), shapes))
            save_file(stored, folder / _file(number, len(files)), metadata={"format": "pt"})
            file.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        names = [_file(number, len(files)) for number in range(1, len(files) + 1)]
        index = {"version": _VERSION, "files": names, "shapes": shapes}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        path = folder / "config.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        section = {"version": _VERSION, "family": data["model_type"], "note": _NOTE}
        data |= {"model_type": MODEL_TYPE, "architectures": [f"HFPrune{name}" for name in data["architectures"]]}
        path.write_text(json.dumps(data | {"hfprune": section}, indent=2) + "\n", encoding="utf-8")
        return True


LAYOUTS.add(Bitmask.name, Bitmask())


def _file(number: int, count: int) -> str:
    return f"bitmask-{number:05}-of-{count:05}.safetensors"


def _packed(tensors: Iterator[tuple[str, Tensor]], shapes: dict[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    """Yields what is stored of ``tensors``; notes the shape of those that are packed."""
    for name, tensor in tensors:
        if is_worth_it(tensor):
            shapes[name] = list(tensor.shape)
            values, bits = pack(tensor)
            yield f"{name}.values", values
            yield f"{name}.bits", bits
        else:
            yield name, tensor


def stored_tensors(path: str, *, revision: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a folder, or hub id, in this layout, in place and with its zeros; one at a time.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    index = json.loads(_fetched(path, INDEX_FILE, revision).read_text(encoding="utf-8"))
    if index.get("version") != _VERSION:
        raise ConfigError(f"'{path}': {INDEX_FILE} was written by another version of hfprune.")
    missing = dict(index["shapes"])
    for file in index["files"]:
        try:
            with safe_open(_fetched(path, file, revision), framework="pt") as tensors:
                names = set(tensors.keys())
                for name in sorted(names):
                    whole = name.removesuffix(".values")
                    if whole in missing and f"{whole}.bits" in names:
                        bits = tensors.get_tensor(f"{whole}.bits")
                        yield whole, unpack(tensors.get_tensor(name), bits, missing.pop(whole), whole)
                    elif name.removesuffix(".bits") not in index["shapes"]:
                        yield name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"'{path}': {file} is damaged: {error}. Copy it again.") from error
    if missing:
        raise ConfigError(f"'{path}': its weight files lack {', '.join(sorted(missing)[:3])}.")


def _fetched(path: str, file: str, revision: str | None) -> Path:
    try:
        return Path(str(cached_file(path, file, revision=revision)))
    except OSError as error:
        raise ConfigError(f"'{path}' has no {file}. Copy all files of one export.") from error


# ---- what transformers' Auto classes call ---------------------------------------------------------------------------


class BitmaskConfig(PreTrainedConfig):
    """The entry point of ``AutoConfig``."""

    model_type = MODEL_TYPE

    @property
    def stock(self) -> Any:
        """The config of the model itself."""
        return self.__dict__["_stock"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the config that ``config_dict`` describes, around a stock one.

        Raises:
            ConfigError: It was written by another version, or for a family that this transformers does not know.
        """
        data = dict(config_dict)
        section = data.pop("hfprune", None)
        if (
            not isinstance(section, dict)
            or section.get("version") != _VERSION
            or section["family"] not in CONFIG_MAPPING
        ):
            raise ConfigError(
                f"config.json has model_type '{MODEL_TYPE}', and its section 'hfprune' is of another version, or names "
                "a family that this transformers does not know."
            )
        names = [str(name).removeprefix("HFPrune") for name in data.get("architectures") or ()]
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        family = section["family"]
        stock, unused = CONFIG_MAPPING[family].from_dict(
            data | {"model_type": family, "architectures": names}, return_unused_kwargs=True, **kwargs
        )
        found = cls()
        found.__dict__["_stock"] = stock
        return (found, unused) if wants_unused else found


class BitmaskForCausalLM:
    """The entry point of ``AutoModelForCausalLM``: makes models of the stock class."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Returns the model saved at ``path``, an instance of its stock class with a stock config.

        Raises:
            ConfigError: A file is missing or damaged.
        """
        state = dict(stored_tensors(str(path), revision=kwargs.pop("revision", None)))
        stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.stock)]
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = stock.from_pretrained(
            None, *args, config=config.stock, state_dict=state, output_loading_info=True, **kwargs
        )
        for key, text in (("missing_keys", "lack"), ("unexpected_keys", "hold, against the config,")):
            if info[key]:
                raise ConfigError(f"'{path}': its weight files {text} {', '.join(sorted(info[key])[:3])}.")
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Returns a model of the stock class with random weights; on the meta device none."""
        stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.stock)]
        return stock._from_config(config.stock, **kwargs)


AutoConfig.register(MODEL_TYPE, BitmaskConfig, exist_ok=True)
AutoModelForCausalLM.register(BitmaskConfig, BitmaskForCausalLM, exist_ok=True)
