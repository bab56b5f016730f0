"""Output folders: results only replace files written by hfprune, never the input model or data."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hfprune.plan import PLAN_FILE, PLAN_FORMAT
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import OwnFolder, tidy

MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
CARD_FILE = "README.md"
REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"
FIGURES_FOLDER = "figures"
IMPORTANCE_FILE = "importance.safetensors"
CHECKPOINT_FOLDER = "checkpoints"
DENSE_CHECKPOINTS = "dense"
"""Subfolder of the checkpoints with those of the dense control."""
EARLIER_CHECKPOINTS = "earlier"
"""Subfolder of the checkpoints with those of the previous run."""
STATE_FOLDER = "layers"
"""Folder with the finished layers of an unfinished sparse run."""

_ADAPTER_FILE = "adapter_config.json"
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bpe", ".tiktoken")
_TEMPLATES = "additional_chat_templates"


def check_replaceable(target: Path, *, overwrite: bool, argument: str) -> None:
    """Raises ``ConfigError`` unless a folder does not exist, is empty, or was written by hfprune completely.

    Args:
        target: The folder.
        overwrite: Whether a model or an adapter written by hfprune may be replaced.
        argument: Name of the argument that gave the folder, for the message.
    """
    tidy(target.parent)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{argument}='{target}' is a file, not a folder.")
    for place, name in ((Path.cwd(), "the current folder"), (Path.home(), "your home folder")):
        if is_within(place, target):
            raise ConfigError(
                f"{argument}='{target}' is {name}, or contains it, and is not replaced. Choose another folder."
            )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{argument}='{target}' is not empty. Choose another folder, or set overwrite=True to replace it."
        )
    if (found := _foreign(target)) is not None:
        raise ConfigError(
            f"{argument}='{target}' is not replaced: hfprune did not write '{found}' in it. Move it elsewhere, "
            "or choose another folder."
        )


def _foreign(folder: Path) -> str | None:
    """Returns the first file in the folder of a model or an adapter that hfprune did not write, or None.

    Without a plan or an adapter config, all files are foreign.
    """
    names = sorted(path.name for path in folder.iterdir())
    adapter = (folder / _ADAPTER_FILE).is_file()
    if not adapter and not _is_plan(folder / PLAN_FILE):
        return names[0]
    for name in names:
        path = folder / name
        own = name == _TEMPLATES if path.is_dir() else name.endswith(_MODEL_SUFFIXES) or _is_own_code(path)
        if not own and not (name == CARD_FILE and (adapter or is_card(path))):
            return name
    return None


def _is_own_code(path: Path) -> bool:
    """Returns whether a file is modeling code for transformers that hfprune wrote, by its first line."""
    if path.suffix != ".py":
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return "by hfprune" in file.readline().lower()


def is_card(path: Path) -> bool:
    """Returns whether a file is a model card that hfprune wrote: ``hfprune`` is among the tags of its metadata."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    metadata = text.split("\n---", 1)[0] if text.startswith("---") else ""
    return "- hfprune" in (line.strip() for line in metadata.splitlines())


def check_results(out: Path, argument: str = "output_dir") -> None:
    """Raises ``ConfigError`` if results would replace files in ``out`` that hfprune did not write."""
    for name in (MODEL_FOLDER, ADAPTER_FOLDER):
        check_replaceable(out / name, overwrite=True, argument=argument)
    OwnFolder(out / STATE_FOLDER).check(argument)
    for name, is_own in _OWN.items():
        path = out / name
        if os.path.lexists(path) and not is_own(path):
            raise ConfigError(
                f"{argument}='{out}' holds a '{name}' that hfprune did not write. Choose another folder, or move it "
                "elsewhere."
            )


def is_sweep(out: Path) -> bool:
    """Returns whether a folder holds results of a sweep."""
    return any((out / name).is_dir() for name in ("cells", "scores")) or _is_table(out / "table.json")


def is_evaluation(path: Path) -> bool:
    """Returns whether a file holds the results of an evaluation."""
    found = _read(path)
    return "stages" in found and "plan" not in found


def is_within(inner: Path, outer: Path) -> bool:
    """Returns whether ``inner`` is ``outer`` or lies in it; links are followed."""
    real = Path(os.path.realpath(inner))
    return outer.exists() and any(place.exists() and place.samefile(outer) for place in (real, *real.parents))


def check_apart(
    out: Path, sources: Mapping[str, str | Path | None], *, argument: str = "output_dir", names: Collection[str] | None
) -> None:
    """Raises ``ConfigError`` if results would be written into an input of the run, or replace it.

    Args:
        out: The output folder.
        sources: Argument -> path of a model or of data; values that do not exist as a path are skipped.
        argument: Name of the argument that gave ``out``.
        names: Entries of ``out`` that are replaced; None for all.
    """
    replaced = [out] if names is None else [out / name for name in names]
    for given, source in sources.items():
        if source is None or not os.path.exists(source):
            continue
        path = Path(source)
        if is_within(out, path) or any(is_within(path, place) for place in replaced):
            raise ConfigError(
                f"{argument}='{out}' and {given}='{source}' overlap: results would replace what the run reads. "
                "Choose another folder."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_plan(path: Path) -> bool:
    return _read(path).get("format") == PLAN_FORMAT


def _is_report(path: Path) -> bool:
    return {"stages", "plan"} <= _read(path).keys()


def _is_table(path: Path) -> bool:
    return {"rows", "cells"} <= _read(path).keys()


def _comes_with_plan(path: Path) -> bool:
    return path.is_file() and _is_plan(path.with_name(PLAN_FILE))


def _comes_with_table(path: Path) -> bool:
    return path.is_file() and _is_table(path.with_name("table.json"))


def _comes_with_report(path: Path) -> bool:
    return _is_report(path.with_name(REPORT_FILE)) or _is_table(path.with_name("table.json"))


def _holds(*suffixes: str, folders: Collection[str] = ()) -> Callable[[Path], bool]:
    def holds(folder: Path) -> bool:
        tidy(folder)
        return folder.is_dir() and all(
            path.name in folders or path.name.endswith((*suffixes, ".hfprune")) for path in folder.iterdir()
        )

    return holds


_OWN: dict[str, Callable[[Path], bool]] = {
    PLAN_FILE: _is_plan,
    REPORT_FILE: _is_report,
    REPORT_PAGE: _comes_with_report,
    FIGURES_FOLDER: _comes_with_report,
    IMPORTANCE_FILE: _comes_with_plan,
    "permutations.safetensors": _comes_with_plan,
    CHECKPOINT_FOLDER: _holds(".ckpt", folders=(DENSE_CHECKPOINTS, EARLIER_CHECKPOINTS)),
    "table.json": _is_table,
    "table.csv": _comes_with_table,
    "table.md": _comes_with_table,
    "cells": _holds(".json"),
    "scores": _holds(".safetensors", ".unfinished"),
}

RESULTS = (MODEL_FOLDER, ADAPTER_FOLDER, STATE_FOLDER, *_OWN)
"""Entries of an output folder that hfprune writes."""
