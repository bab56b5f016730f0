"""Reading models from a folder or the hub, checked before anything expensive happens."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hfprune.arch import ARCHITECTURES
from hfprune.embedded import EMBEDDED_NAME, embedded_model
from hfprune.errors import ConfigError
from hfprune.layouts import cut_of, is_per_layer
from hfprune.layouts.bitmask_auto import bitmask_stock
from hfprune.plan import PLAN_FILE
from hfprune.quiet import no_progress_bars

DTypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def check_model_path(path: str, *, flag: str = "--model.path") -> None:
    """Raises ``ConfigError`` when ``path`` can be seen to be no model: cheap, reads no weights.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        flag: What gave it, for the message.
    """
    if path == EMBEDDED_NAME:
        return
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{flag} '{path}' has no config.json: it is not a saved Hugging Face model.")
        return
    if folder.exists():
        raise ConfigError(f"{flag} '{path}' is a file; give the folder of a saved model, or a hub id.")
    if not _is_hub_id(path):
        raise ConfigError(f"{flag} '{path}' does not exist, and it is not of the form of a hub id (owner/name).")


def _is_hub_id(path: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not path.startswith((".", "/", "~"))


def resolve_model_path(path: str) -> str:
    """Returns what transformers can load: the folder of the embedded model for its name, else ``path``."""
    check_model_path(path)
    return str(embedded_model()) if path == EMBEDDED_NAME else path


def previous_plan(path: str) -> Path | None:
    """Returns the plan file of a folder that hfprune wrote, or None."""
    plan = Path(path) / PLAN_FILE
    return plan if plan.is_file() else None


def load_config(path: str, *, revision: str | None = None) -> Any:
    """Returns the model's config, with its plans where the layers differ in width.

    Raises:
        ConfigError: It cannot be read.
        PlanError: Its plans cannot.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model_path(path), revision=revision)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"Cannot read the config of --model.path '{path}': {_first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"--model.path '{path}' is quantised; prune the full-precision model, then quantise.")
    config = bitmask_stock(config)
    if is_per_layer(config):
        cut_of(config, path=resolve_model_path(path), revision=revision)
    return config


def meta_model(path: str, *, revision: str | None = None) -> nn.Module:
    """Returns the model on the meta device: every shape, no weight read. For budgets and checks."""
    from transformers import AutoModelForCausalLM

    config = load_config(path, revision=revision)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(f"--model.path '{path}' is not a causal language model: {_first_line(error)}") from error
    return model


def load(
    folder: str | Path,
    *,
    dtype: DTypeName | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Any:
    """Returns the model in a folder that hfprune wrote, in any layout, as an instance of its stock class, in eval mode.

    Args:
        folder: The folder (``OUT/model``), or a hub id.
        dtype: Type of the weights; ``auto`` takes what was saved.
        device: Where to put it; the CPU by default.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ConfigError: Config or weights cannot be read, or the weights hold a NaN or infinity.
        PlanError: The plan is missing or damaged, or config, plan and weights do not belong together.
    """
    name: Any = str(dtype).removeprefix("torch.")
    model = load_causal_lm(str(folder), dtype=name, revision=revision)
    return model if device is None else model.to(device)


def load_causal_lm(path: str, *, dtype: DTypeName = "auto", revision: str | None = None) -> Any:
    """Returns the model with its weights, on the CPU.

    Raises:
        ConfigError: The weights cannot be read, or hold a NaN or infinity (the message names the first parameter).
        PlanError: The layers differ in width, and the plan that tells is missing or does not fit.
    """
    from transformers import AutoModelForCausalLM

    load_config(path, revision=revision)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(resolve_model_path(path), dtype=torch_dtype, revision=revision)
    except ConfigError:  # says more than its first line
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Cannot load the weights of --model.path '{path}': {_first_line(error)}") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(f"--model.path '{path}': parameter {name} holds NaN or infinity.")
    return model


def weight_files(path: str, *, revision: str | None = None) -> list[Path]:
    """Returns the safetensors files of a saved model, fetched from the hub when ``path`` is a hub id.

    Raises:
        ConfigError: There are none.
    """
    folder = Path(resolve_model_path(path))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(f"Cannot fetch the weights of --model.path '{path}': {_first_line(error)}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"--model.path '{path}' has no safetensors files, which a sharded strategy reads parameter by parameter. "
            "Save the model again with save_pretrained."
        )
    return files


def model_files(path: str, *, revision: str | None = None) -> list[Path]:
    """Returns config and weight files of a saved model, fetched from the hub when ``path`` is a hub id."""
    folder = Path(resolve_model_path(path))
    if not folder.is_dir():
        weights = weight_files(path, revision=revision)
        return [weights[0].parent / "config.json", *weights]
    return [
        folder / "config.json",
        *sorted(file for kind in ("safetensors", "bin") for file in folder.glob(f"*.{kind}")),
    ]


def load_tokenizer(path: str, *, revision: str | None = None) -> Any:
    """Returns the model's tokenizer; raises ``ConfigError`` when the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(path), revision=revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--model.path '{path}' has no usable tokenizer ({_first_line(error)}). Save the model's tokenizer into "
            "the folder (tokenizer.save_pretrained)."
        ) from error


def max_positions(config: Any) -> int | None:
    """Returns how many positions the model allows, None when its config does not say."""
    value = getattr(config, "max_position_embeddings", None)
    return None if value is None else int(value)


def predicts_badly_without_bos(config: Any) -> bool:
    """Returns whether the table of the model's class says that a text has to begin with BOS (Gemma)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config()
    names = {*(text.architectures or ()), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)}
    return any(ARCHITECTURES.get(name).needs_bos for name in ARCHITECTURES if name in names)


def _first_line(error: Exception) -> str:
    """Returns the first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
