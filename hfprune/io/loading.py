"""LoadingOptions: where a model is read from, and how; turned into arguments of transformers and huggingface_hub."""

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from hfprune.utils.errors import ConfigError
from hfprune.utils.files import user_path

DTypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Options of every function that reads a model, a config or a tokenizer, named as in ``from_pretrained``.

    Attributes:
        dtype: Dtype of the weights; ``auto`` uses the saved dtype.
        revision: Branch, tag or commit of a hub id.
        subfolder: Folder of the model within the folder or the repository.
        token: Access token of the hub, or True for the saved one. It is not written anywhere. The environment variable
            ``HF_TOKEN`` and ``hf auth login`` work without it.
        cache_dir: Folder of downloaded files; that of huggingface_hub if not given.
        local_files_only: Whether to read downloaded files only.
        attn_implementation: Attention implementation, such as ``sdpa``, ``eager`` or ``flash_attention_2``; that of
            transformers if not given.

    Raises:
        ConfigError: A value is malformed.

    Example:
        >>> LoadingOptions(revision="main", token="hf_secret").describe()
        {'revision': 'main'}
    """

    dtype: DTypeName = "auto"
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        """Checks the values and expands ``~``."""
        name = str(self.dtype).removeprefix("torch.")
        if name not in get_args(DTypeName):
            raise ConfigError(f"dtype='{name}' is not one of {', '.join(get_args(DTypeName))}.")
        object.__setattr__(self, "dtype", name)
        for option in ("revision", "token", "cache_dir", "attn_implementation"):
            if getattr(self, option) == "":
                raise ConfigError(f"{option} is empty: leave it out, or give a value.")
        if self.subfolder is not None:
            inner = PurePosixPath(self.subfolder)
            if inner.is_absolute() or ".." in inner.parts:
                raise ConfigError(f"subfolder='{self.subfolder}' must be a folder within the model's folder.")
            object.__setattr__(self, "subfolder", str(inner) if inner.parts else None)
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", user_path(self.cache_dir, "cache_dir"))

    @classmethod
    def of(cls, given: "LoadingOptions | None", **options: Any) -> "LoadingOptions":
        """Returns ``given``, or the defaults, with single options replaced.

        Args:
            given: The options, or None for the defaults.
            options: Options that replace those of ``given``; None and ``auto`` leave them.
        """
        found = given or cls()
        changed = {name: value for name, value in options.items() if value is not None and value != "auto"}
        return replace(found, **changed) if changed else found

    def elsewhere(self, *, revision: str | None = None, subfolder: str | None = None) -> "LoadingOptions":
        """Returns the options for another model: the same access and dtype, its own revision and subfolder."""
        return replace(self, revision=revision, subfolder=subfolder)

    def within(self, folder: str) -> str:
        """Returns the folder of the model: the subfolder of a local folder."""
        return folder if self.subfolder is None else str(Path(folder) / self.subfolder)

    def repository(self) -> dict[str, Any]:
        """Returns the arguments of ``snapshot_download`` and similar functions of huggingface_hub."""
        found = {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}
        found |= {"local_files_only": self.local_files_only or None}
        return {name: value for name, value in found.items() if value is not None}

    def files(self, resolved: str) -> dict[str, Any]:
        """Returns the arguments of ``from_pretrained`` that locate files; none for a local folder.

        Args:
            resolved: Local folder of the model, or its hub id.
        """
        if Path(resolved).is_dir():
            return {}
        return self.repository() | ({} if self.subfolder is None else {"subfolder": self.subfolder})

    def config(self, resolved: str) -> dict[str, Any]:
        """Returns the arguments of ``AutoConfig.from_pretrained``."""
        return self.files(resolved) | self.attention()

    def weights(self, resolved: str) -> dict[str, Any]:
        """Returns the arguments of ``AutoModelForCausalLM.from_pretrained``."""
        return {"dtype": self.dtype} | self.config(resolved)

    def attention(self) -> dict[str, Any]:
        """Returns the argument that selects the attention implementation, if one is given."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}

    def patterns(self, *names: str) -> list[str]:
        """Returns names of files in the repository, within the subfolder."""
        return [name if self.subfolder is None else f"{self.subfolder}/{name}" for name in names]

    def describe(self) -> dict[str, Any]:
        """Returns the options that are not defaults as plain data, without the token."""
        default = LoadingOptions()
        names = ("dtype", "revision", "subfolder", "cache_dir", "local_files_only", "attn_implementation")
        return {name: value for name in names if (value := getattr(self, name)) != getattr(default, name)}
