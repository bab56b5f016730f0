"""Files of tensors that can be made again, each written in one step and used only for the key it was made for."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfprune.files import write_tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, **facts: str) -> None:
    """Writes tensors in one step.

    Args:
        path: The file; its folder is made where it is not there.
        tensors: Name -> tensor, of any shape, on any device.
        key: What the tensors depend on.
        facts: More for the file's metadata.

    Raises:
        OutputError: The file cannot be written; one that was there before stays as it is.
    """
    write_tensors(path, tensors, {"key": key, **facts})


def load_tensors(path: Path, *, key: str) -> dict[str, Tensor] | None:
    """Returns the tensors that were saved for ``key``; None when there are none, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
