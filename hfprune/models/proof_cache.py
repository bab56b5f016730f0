"""Cache of proofs, so that a class is derived and proven once per machine and not once per command.

A proof is stored by the class and its source, the switches of the config, and the versions of transformers and hfprune.
Files are small JSON texts in the user's cache folder: ``$HFPRUNE_CACHE``, else ``hfprune`` in ``$XDG_CACHE_HOME`` or
``~/.cache``. A file that cannot be read is made again; it is never an error.
"""

import functools
import hashlib
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

import torch
from torch import nn

from hfprune.models.contexts import ordinary
from hfprune.models.proof import Proof, prove
from hfprune.models.spec import ArchSpec
from hfprune.models.twins import twin, twin_config
from hfprune.utils.errors import OutputError, UnsupportedArchitectureError
from hfprune.utils.files import write_json
from hfprune.utils.versions import versions

_FORMAT = 1

_KNOWN: dict[tuple[type, str], Proof | str] = {}
"""Class and key -> proof, or the reason why there is none; reasons are kept in this process only."""


def proof_of(
    kind: type[nn.Module], config: Any, describe: Callable[[nn.Module], ArchSpec], *, source: str = "derived"
) -> Proof:
    """Returns the proof for a class and config, from the cache if it is there.

    Args:
        kind: Class of the model.
        config: Its config, of any size.
        describe: Returns the table for a tiny model: a derivation, or a function that returns a known table.
        source: What ``describe`` depends on other than the class and the code of hfprune: the text of a known table.

    Raises:
        UnsupportedArchitectureError: No tiny model of the class runs, or it cannot be described.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hfprune.models.architectures import LLAMA
        >>> proof_of(LlamaForCausalLM, LlamaConfig(), lambda tiny: LLAMA, source=repr(LLAMA)).verdict
        'proven'
    """
    key = _key(kind, config, source)
    if (kind, key) not in _KNOWN:
        stored = _read(key) if _is_persistent(kind) else None
        _KNOWN[kind, key] = stored or _made(kind, config, describe, key)
    found = _KNOWN[kind, key]
    if isinstance(found, str):
        raise UnsupportedArchitectureError(found)
    return found


def cache_folder() -> Path:
    """Returns the folder of stored proofs."""
    own = os.environ.get("HFPRUNE_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfprune"
    return base.expanduser() / "proofs"


def _made(kind: type[nn.Module], config: Any, describe: Callable[[nn.Module], ArchSpec], key: str) -> Proof | str:
    try:
        with ordinary():  # the caller may be building its model on the meta device, or in another type
            tiny = twin(config, model_class=kind)
            proof = prove(describe(tiny), tiny)
    except UnsupportedArchitectureError as error:
        return str(error)
    if not _is_persistent(kind):
        return proof
    with suppress(OutputError, OSError):  # a read-only home: the proof is made again next time
        (folder := cache_folder()).mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{key}.json", {"class": kind.__name__, "format": _FORMAT, "proof": asdict(proof)})
    return proof


def _read(key: str) -> Proof | None:
    """Returns a stored proof; None if there is none that can be read."""
    try:
        data = json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
        found = _value(Proof, data["proof"]) if data["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, Proof) else None


def _key(kind: type[nn.Module], config: Any, source: str) -> str:
    tiny = twin_config(config)
    switches = tiny.to_dict()
    switches.pop("transformers_version", None)
    facts = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "code": _code(kind, tiny),
        "config": switches,
        "versions": {name: versions().get(name) for name in ("hfprune", "torch", "transformers")},
        "own_code": _own_code(),
        "source": source,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{kind.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _is_persistent(kind: type) -> bool:
    """Returns whether the code of a class is in a file, under its name: not in a notebook or a function."""
    return "<locals>" not in kind.__qualname__ and _file(kind) is not None


def _file(kind: type) -> Path | None:
    """Returns the file that defines a class; None for a class of a notebook."""
    try:
        file = Path(inspect.getfile(kind))
    except (OSError, TypeError):
        return None
    return file if file.is_file() else None


def _code(kind: Any, config: Any) -> str:
    """Returns a digest of the files that define a class and its modules, which may change between two runs.

    Those of torch and transformers follow from their versions.
    """
    kinds = {kind}
    with suppress(Exception), ordinary(), torch.device("meta"):  # a class that cannot be built has no proof to store
        kinds |= {type(module) for module in kind(config).modules()}
    own = {_file(found) for found in kinds if found.__module__.partition(".")[0] not in ("torch", "transformers")}
    texts = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in own if file is not None)
    return " ".join(texts)


@functools.cache
def _own_code() -> str:
    """Returns a digest of the modules that derive, prove and cut."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _value(kind: Any, data: Any) -> Any:
    """Returns plain data as a value of a type: a dataclass, a tuple, an optional or literal one, or a mapping.

    >>> _value(tuple[tuple[str, int], ...], [["a", 1]]), _value(int | None, None)
    ((('a', 1),), None)
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{f.name: _value(hints[f.name], data[f.name]) for f in fields(kind)})  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        return None if data is None else _value(next(item for item in inner if item is not type(None)), data)
    if origin is tuple:
        kinds = inner[:1] * len(data) if inner[-1:] == (...,) else inner
        return tuple(_value(item, entry) for item, entry in zip(kinds, data, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _value(inner[1], entry) for key, entry in data.items()}
    if origin is Literal:
        if data not in inner:
            raise ValueError(data)
        return data
    if not isinstance(data, kind):
        raise TypeError(f"{data!r} is no {kind}")
    return data
