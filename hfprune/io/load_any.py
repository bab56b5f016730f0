"""Loading of any folder or hub id: dense, pruned in any layout, adapters, or a plan with its base model."""

import warnings
from pathlib import Path
from typing import Any

import torch

from hfprune.io.load import load_causal_lm, reading
from hfprune.io.loading import DTypeName, LoadingOptions
from hfprune.io.model_files import adapter_base, is_adapter
from hfprune.io.rebuild import load_rebuilt
from hfprune.utils.files import user_path


def load(
    folder: str | Path,
    *,
    dtype: DTypeName | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    plan: Any = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """Loads a model saved by hfprune (in any layout) or by transformers; with ``plan``, prunes the dense model first.

    For a folder of adapters (``OUT/adapter``), a PEFT model around the pruned model is returned. The pruned model is
    searched next to the adapters and in their folder first, so that both can be moved together.

    Args:
        folder: The folder (``OUT/model``, ``OUT/adapter``), or a hub id.
        dtype: Dtype of the weights; ``auto`` uses the saved dtype.
        device: Device of the model; the CPU if not given.
        revision: Branch, tag or commit of a hub id.
        plan: What to prune from the dense model in ``folder``: a :class:`hfprune.PruningPlan`, a plan file, or a folder
            or hub id that ``hfprune push --what plan`` wrote, whose refitted weights are put in place.
        subfolder: Folder of the model within ``folder``.
        token: Access token of the hub, or True for the saved one.
        cache_dir: Folder of downloaded files.
        local_files_only: Whether to read downloaded files only.
        attn_implementation: Attention implementation, such as ``sdpa`` or ``eager``.

    Returns:
        The model in eval mode, an instance of its stock class.

    Raises:
        ConfigError: Config or weights cannot be read, or the weights hold a NaN or infinity.
        PlanError: The plan is missing, damaged or made for another model, or config, plan and weights are inconsistent.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(config).save_pretrained(folder)
        ...     model = load(folder, dtype="bfloat16")
        >>> type(model).__name__, model.dtype, model.training
        ('LlamaForCausalLM', torch.bfloat16, False)
    """
    name: Any = str(dtype).removeprefix("torch.")
    loading = LoadingOptions(
        dtype=name,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        attn_implementation=attn_implementation,
    )
    model = load_rebuilt(str(folder), plan, loading=loading) if plan is not None else load_with(str(folder), loading)
    return model if device is None else model.to(device)


def load_with(folder: str, loading: LoadingOptions) -> Any:
    """Returns the model of a folder, or of an adapter folder, in eval mode; as :func:`load` without a plan.

    Args:
        folder: The folder, or a hub id.
        loading: How it is read.

    Raises:
        ConfigError: As :func:`load`.
        PlanError: As :func:`load`.
    """
    path = Path(loading.within(user_path(folder, "folder")))
    if is_adapter(path):
        return _load_adapted(path, loading)
    return load_causal_lm(folder, loading=loading, argument="folder")


def _load_adapted(folder: Path, loading: LoadingOptions) -> Any:
    """Returns the base model with the adapters, whose config refers to the current folder of the base model."""
    from peft import PeftConfig, PeftModelForCausalLM

    where = f"folder='{folder}'"
    base = adapter_base(folder, where)
    model = load_causal_lm(base, loading=loading.elsewhere(), argument="base_model_name_or_path")
    with reading(f"Cannot load the adapters of {where} into the model in '{base}'"), warnings.catch_warnings():
        config = PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = base
        # peft 0.21 asks for an attribute that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return PeftModelForCausalLM.from_pretrained(model, str(folder), config=config).eval()
