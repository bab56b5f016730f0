"""Loading of models from a folder or the hub, with checks before any expensive work."""

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfprune.io.demo_model import EMBEDDED_NAME, embedded_model
from hfprune.io.layouts import cut_of, is_per_layer, run_empty
from hfprune.io.layouts.bitmask import bitmask_stock, is_bitmask
from hfprune.io.loading import DTypeName, LoadingOptions
from hfprune.io.model_files import (
    check_files,
    check_info,
    check_shapes,
    check_tied,
    check_vocabulary,
    has_weights,
    outside_text,
    weight_shapes,
)
from hfprune.io.progress import quiet_transformers
from hfprune.models import ARCHITECTURES, is_supported
from hfprune.plan import PLAN_FILE
from hfprune.utils.compat import cached_file_or_none, is_repo_id
from hfprune.utils.errors import ConfigError, HFPruneError, first_line
from hfprune.utils.files import user_path

_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SWITCHES = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Config entries that only change the return value of a forward pass, with their defaults."""

_CLEAR_ERRORS = (ValueError, OSError, ImportError, RuntimeError)
"""Errors whose message is clear by itself; for other errors, the type is added (``KeyError: ...``)."""

_TEXT_MODEL = (
    "m = AutoModelForCausalLM.from_pretrained({path}); "
    "t = AutoModelForCausalLM.from_config(m.config.get_text_config(), dtype=m.dtype); "
    "t.model, t.lm_head = m.model.language_model, m.lm_head; t.save_pretrained('TEXT'). Then save the "
    "tokenizer there, and give TEXT."
)


def check_model_path(path: str, *, argument: str = "path", loading: LoadingOptions | None = None) -> None:
    """Raises ``ConfigError`` if ``path`` is evidently not a model. Reads no weights and does not access the hub.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        argument: Name of the argument that gave it, for the message.
        loading: Revision, subfolder, token and others; the defaults if not given.
    """
    loading, where = LoadingOptions.of(loading), f"{argument}='{path}'"
    if path == EMBEDDED_NAME:
        if loading.subfolder is not None:
            raise ConfigError(f"{where} is the embedded model, which has no subfolder='{loading.subfolder}'.")
        return
    folder = Path(user_path(path, argument))
    if folder.is_dir():
        check_files(_inner(folder, where, loading), where)
    elif folder.exists():
        raise ConfigError(f"{where} is a file, not the folder of a saved model or a hub id.")
    elif not is_repo_id(path) or path.startswith((".", "/", "~")):
        raise ConfigError(f"{where} does not exist, and is not a valid hub id (owner/name).{_near(folder)}")
    elif folder.parent != Path() and folder.parent.is_dir() and not _is_cached(path, loading):
        raise ConfigError(
            f"{where} does not exist: the local folder '{folder.parent}' has no '{folder.name}'.{_near(folder)} To "
            "load a model with this name from the hub, run in another folder."
        )


def _near(folder: Path) -> str:
    """Returns a suggestion for a misspelled folder, or an empty text."""
    if not folder.parent.is_dir():
        return ""
    near = difflib.get_close_matches(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()], n=1)
    return f" Did you mean '{folder.parent / near[0]}'?" if near else ""


def _inner(folder: Path, where: str, loading: LoadingOptions) -> Path:
    """Returns the subfolder of an existing folder."""
    inner = Path(loading.within(str(folder)))
    if not inner.is_dir():
        raise ConfigError(f"{where} has no folder '{loading.subfolder}' (subfolder).{_near(inner)}")
    return inner


def _is_cached(path: str, loading: LoadingOptions) -> bool:
    return _cached_config(path, loading) is not None


def _cached_config(path: str, loading: LoadingOptions) -> Path | None:
    """Returns the downloaded config of a hub id, or None."""
    from huggingface_hub import try_to_load_from_cache

    (file,) = loading.patterns("config.json")
    found = try_to_load_from_cache(path, file, cache_dir=loading.cache_dir, revision=loading.revision)
    return Path(found) if isinstance(found, str) else None


def commit_of(path: str, loading: LoadingOptions) -> str | None:
    """Returns the commit of the hub from which a downloaded model was read; None for a local folder.

    Args:
        path: The hub id, or a folder.
        loading: How the model was read.
    """
    if path == EMBEDDED_NAME or Path(path).is_dir() or not is_repo_id(path):
        return None
    config = _cached_config(path, loading)
    parts = () if config is None else config.parts
    return next((commit for name, commit in pairwise(parts) if name == "snapshots"), None)


def resolve_model_path(path: str, *, argument: str = "path", loading: LoadingOptions | None = None) -> str:
    """Returns the path for transformers: the folder of the embedded model for its name, otherwise ``path``.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        argument: Name of the argument that gave it, for the message.
        loading: Revision, subfolder, token and others; the defaults if not given.

    Raises:
        ConfigError: ``path`` is evidently not a model.
    """
    check_model_path(path, argument=argument, loading=loading)
    if path == EMBEDDED_NAME:
        return str(embedded_model())
    folder = user_path(path, argument)
    return LoadingOptions.of(loading).within(folder) if Path(folder).is_dir() else folder


def _looked_up(resolved: str, loading: LoadingOptions) -> str:
    """Returns where a model was looked for if it is not a local folder, for messages."""
    if Path(resolved).is_dir():
        return ""
    given = [f"{name}='{value}'" for name in ("revision", "subfolder") if (value := getattr(loading, name)) is not None]
    within = f" with {', '.join(given)}" if given else ""
    where = "in the cache of downloaded files" if loading.local_files_only else "on the hub"
    return f" (there is no such folder; it was looked up {where}{within})"


def check_model(path: str, *, loading: LoadingOptions | None = None, argument: str = "path") -> None:
    """Checks the files, config, class, tensor names and tensor shapes of a local model without reading its weights.

    A folder without weight files is accepted, since config.json is sufficient for a budget;
    :func:`check_weight_files` rejects it. Hub ids and the embedded model (which has checksums) are not checked.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        loading: Revision, subfolder, token and others; the defaults if not given.
        argument: Name of the argument that gave ``path``, for the message.

    Raises:
        ConfigError: The model cannot be used.
        PlanError: Its layers differ in width, and a plan is missing or damaged.
    """
    folder, where = Path(user_path(path, argument)), f"{argument}='{path}'"
    if path == EMBEDDED_NAME or not folder.is_dir():
        return
    loading = LoadingOptions.of(loading)
    config = load_config(path, loading=loading, argument=argument)
    folder = Path(loading.within(str(folder)))
    model = _empty_model(config, where, loading)
    if is_supported(model):
        with reading(f"{where}: the model described by config.json cannot be run"):
            run_empty(model)
    if not is_bitmask(folder) and not is_per_layer(config) and has_weights(folder):
        with quiet_transformers():
            check_shapes(model, weight_shapes(folder, where), where)
            check_tied(model, folder, where)


def check_weight_files(path: str, *, argument: str = "path", loading: LoadingOptions | None = None) -> None:
    """Raises ``ConfigError`` if a local folder has no weight files, or damaged ones."""
    folder = Path(LoadingOptions.of(loading).within(user_path(path, argument)))
    if path != EMBEDDED_NAME and folder.is_dir() and not is_bitmask(folder):
        weight_shapes(folder, f"{argument}='{path}'")


def previous_plan(path: str, *, loading: LoadingOptions | None = None) -> Path | None:
    """Returns the plan file of a model folder written by hfprune, or None."""
    plan = Path(LoadingOptions.of(loading).within(path)) / PLAN_FILE
    return plan if plan.is_file() else None


def load_config(
    path: str, *, revision: str | None = None, argument: str = "path", loading: LoadingOptions | None = None
) -> Any:
    """Returns the model's config, with its plans if the layers differ in width.

    Entries that only change the return value of a forward pass are reset to their defaults. References to code outside
    transformers (``auto_map``), which hfprune does not run, are removed.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        revision: Branch, tag or commit of a hub id; as ``loading.revision``.
        argument: Name of the argument that gave ``path``, for the message.
        loading: Revision, subfolder, token and others; the defaults if not given.

    Raises:
        ConfigError: The config cannot be read, or describes an unsupported model.
        PlanError: A plan is missing or damaged.
    """
    from transformers import AutoConfig

    loading = LoadingOptions.of(loading, revision=revision)
    resolved, where = resolve_model_path(path, argument=argument, loading=loading), f"{argument}='{path}'"
    with reading(f"Cannot read the config of {where}{_looked_up(resolved, loading)}"), quiet_transformers():
        config = AutoConfig.from_pretrained(resolved, trust_remote_code=False, **loading.config(resolved), **_SWITCHES)
    _check_config(config, where)
    config = bitmask_stock(config)
    vars(config).pop("auto_map", None)
    if is_per_layer(config):
        cut_of(config, path=resolved, **loading.files(resolved))
    return config


def _check_config(config: Any, where: str) -> None:
    """Raises ``ConfigError`` for a readable config that hfprune does not support."""
    if any(getattr(config, key, None) for key in ("quantization_config", "compression_config")):
        raise ConfigError(f"{where} is quantised; prune the full-precision model, then quantise.")
    text = config.get_text_config()
    if text is not config:
        recipe = _TEXT_MODEL.format(path=where.partition("=")[2])
        raise ConfigError(
            f"{where} is a multimodal model ({type(config).__name__}); hfprune supports its text model "
            f"({type(text).__name__}) only. Save the text model separately: {recipe}"
        )
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{where}: architectures {names!r} in config.json is not a list of class names.")
    if config.dtype not in _DTYPES:
        raise ConfigError(
            f"{where}: dtype {str(config.dtype).removeprefix('torch.')} in config.json is not supported. Set it to the "
            "dtype of the weights: float32, bfloat16 or float16."
        )
    pad, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ConfigError(f"{where}: vocab_size {vocabulary} in config.json is not a positive number.")
    if isinstance(pad, int) and pad >= vocabulary:
        raise ConfigError(
            f"{where}: pad_token_id {pad} in config.json is outside the vocabulary of {vocabulary} tokens. Set it to "
            "null or to a valid token id."
        )


def meta_model(
    path: str, *, revision: str | None = None, argument: str = "path", loading: LoadingOptions | None = None
) -> nn.Module:
    """Returns the model on the meta device, without reading weights; arguments as in :func:`load_config`."""
    loading = LoadingOptions.of(loading, revision=revision)
    config = load_config(path, loading=loading, argument=argument)
    model: nn.Module = _empty_model(config, f"{argument}='{path}'", loading)
    return model


def _empty_model(config: Any, where: str, loading: LoadingOptions) -> Any:
    from transformers import AutoModelForCausalLM

    with reading(f"{where}: the model described by config.json cannot be built"), quiet_transformers():
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, **loading.attention())
        except ImportError as error:  # an attention implementation, for example
            if loading.attn_implementation is not None:
                raise ConfigError(
                    f"attn_implementation='{loading.attn_implementation}' cannot be used for {where}: "
                    f"{first_line(error)}"
                ) from error
            raise ConfigError(
                f"{where}: config.json requires a package that is not installed: {first_line(error)} Install it, or "
                "remove the entry (attn_implementation) from config.json."
            ) from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Context that turns errors of transformers about a user's files into a ``ConfigError`` of one line."""
    try:
        yield
    except HFPruneError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, _CLEAR_ERRORS) else f"{type(error).__name__}: "
        raise ConfigError(f"{what}: {kind}{first_line(error)}") from error


def load_causal_lm(
    path: str,
    *,
    dtype: DTypeName = "auto",
    revision: str | None = None,
    argument: str = "path",
    loading: LoadingOptions | None = None,
) -> Any:
    """Returns the model with its weights, on the CPU.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        dtype: Dtype of the weights; as ``loading.dtype``.
        revision: Branch, tag or commit of a hub id; as ``loading.revision``.
        argument: Name of the argument that gave ``path``, for the message.
        loading: Revision, subfolder, token and others; the defaults if not given.

    Raises:
        ConfigError: The weights cannot be read, do not match config.json, or hold a NaN or infinity.
        PlanError: The layers differ in width, and the plan is missing or does not fit.
    """
    from transformers import AutoModelForCausalLM

    loading = LoadingOptions.of(loading, dtype=dtype, revision=revision)
    resolved, where = resolve_model_path(path, argument=argument, loading=loading), f"{argument}='{path}'"
    config = load_config(path, loading=loading, argument=argument)
    check_weight_files(path, argument=argument, loading=loading)
    kwargs = loading.weights(resolved)
    kwargs |= {"trust_remote_code": False, "output_loading_info": True, **_SWITCHES}
    if not is_per_layer(config):
        kwargs["ignore_mismatched_sizes"] = True  # check_info reports them in one line
    with reading(f"Cannot load the weights of {where}"), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(resolved, **kwargs)
    model, info = loaded
    if outside := check_info(model, info, where):
        warnings.warn(outside_text(outside, where), stacklevel=2)
    vars(model.config).pop("auto_map", None)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(f"{where}: parameter {name} holds NaN or infinity.")
    return model


def read_generation_config(model: Any, path: str, *, loading: LoadingOptions | None = None) -> None:
    """Sets the saved generation config, if any, of a model that was not created by ``from_pretrained``."""
    from transformers import GenerationConfig

    resolved = resolve_model_path(path, loading=loading)
    hub = LoadingOptions.of(loading).files(resolved)
    if cached_file_or_none(resolved, "generation_config.json", **hub) is not None:
        with reading(f"Cannot read the generation config of path='{path}'"):
            model.generation_config = GenerationConfig.from_pretrained(resolved, **hub)


def weight_files(path: str, *, loading: LoadingOptions | None = None) -> list[Path]:
    """Returns the safetensors files of a saved model, downloaded if ``path`` is a hub id.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        loading: Revision, subfolder, token and others; the defaults if not given.

    Raises:
        ConfigError: The model has no safetensors files, or they cannot be downloaded.
    """
    loading = LoadingOptions.of(loading)
    folder = Path(resolve_model_path(path, loading=loading))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            wanted = loading.patterns("*.safetensors", "*.json")
            folder = Path(loading.within(snapshot_download(path, allow_patterns=wanted, **loading.repository())))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(f"Cannot fetch the weights of path='{path}': {first_line(error)}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"path='{path}' has no safetensors files, which a sharded strategy requires. Save the model again with "
            "save_pretrained."
        )
    return files


def model_files(path: str, *, loading: LoadingOptions | None = None) -> list[Path]:
    """Returns the config and weight files of a saved model, downloaded if ``path`` is a hub id."""
    folder = Path(resolve_model_path(path, loading=loading))
    if not folder.is_dir():
        weights = weight_files(path, loading=loading)
        return [weights[0].parent / "config.json", *weights]
    return [
        folder / "config.json",
        *sorted(file for kind in ("safetensors", "bin") for file in folder.glob(f"*.{kind}")),
    ]


def load_tokenizer(path: str, *, loading: LoadingOptions | None = None) -> Any:
    """Returns the model's tokenizer; raises ``ConfigError`` if the folder has none."""
    from transformers import AutoTokenizer

    loading = LoadingOptions.of(loading)
    resolved, where = resolve_model_path(path, loading=loading), f"path='{path}'"
    if Path(resolved).is_dir():
        check_vocabulary(Path(resolved), where)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(resolved, trust_remote_code=False, **loading.files(resolved))
            tokenizer.decode(tokenizer("a")["input_ids"])  # a damaged config may load, and fail with the first text
    except Exception as error:  # tokenizers raises a plain Exception
        raise ConfigError(
            f"{where}{_looked_up(resolved, loading)} has no usable tokenizer ({first_line(error)}). Save the model's "
            "tokenizer into the folder (tokenizer.save_pretrained)."
        ) from error
    tokenizer.init_kwargs.pop("auto_map", None)  # remote code, which is neither run nor exported
    return tokenizer


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises ``ConfigError`` if a tokenizer has token ids outside a model's ``vocab_size`` embeddings."""
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not beyond:
        return
    tokens = ", ".join(repr(token) for token in sorted(beyond, key=lambda token: beyond[token])[:3])
    raise ConfigError(
        f"The tokenizer has {len(tokenizer)} tokens, but the model has {vocab_size} embeddings: there is none for "
        f"{tokens}{', ...' if len(beyond) > 3 else ''}. If the tokens were added, resize the embeddings "
        "(model.resize_token_embeddings(len(tokenizer)), then save_pretrained), or use the tokenizer without them. "
        "Otherwise the tokenizer belongs to another model."
    )


def max_positions(config: Any) -> int | None:
    """Returns the maximum sequence length of a model, or None if its config has none."""
    value = getattr(config, "max_position_embeddings", None)
    return None if value is None else int(value)


def predicts_badly_without_bos(config: Any) -> bool:
    """Returns whether the model's architecture requires texts to begin with BOS (Gemma)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config()
    names = {*(text.architectures or ()), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)}
    return any(ARCHITECTURES.get(name).needs_bos for name in ARCHITECTURES if name in names)
