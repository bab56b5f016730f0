"""What hfprune left in a folder: the model, its plan, its adapter and the report of its run. Weights are not read."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.io.loading import LoadingOptions
from hfprune.io.output_folder import ADAPTER_FOLDER, MODEL_FOLDER, REPORT_FILE
from hfprune.plan import PLAN_FILE, SUBLAYERS, PruningPlan
from hfprune.utils.errors import ConfigError, first_line, hub_reason
from hfprune.utils.files import user_path

BITMASK_FILE = "bitmask.json"
_CONFIG, _ADAPTER_CONFIG, _REBUILD = "config.json", "adapter_config.json", "rebuild.json"
_HUB_FILES = [_CONFIG, _ADAPTER_CONFIG, BITMASK_FILE, _REBUILD, "plan*.json"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_DATA_FILES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".arrow"}
_EMBEDDED = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name of the embedded model -> its id on the hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedFolder:
    """A folder of hfprune, or of a model.

    Attributes:
        given: The path or hub id as the user gave it.
        model: Folder of the model; of a plan package the package.
        adapter: Folder of the adapter; None without one.
        config: Content of the model's config.json; empty for a plan package.
        plan: What was removed; None for a model that hfprune did not write.
        report: Content of the run's report.json; empty without one.
    """

    given: str
    model: Path
    adapter: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    plan: PruningPlan | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the plan was made."""
        return {} if self.plan is None else self.plan.provenance

    @property
    def layout(self) -> str:
        """Name of the layout; ``plan`` for a package without weights of the model."""
        if not self.config:
            return "plan"
        if (self.model / BITMASK_FILE).is_file():
            return "bitmask"
        if self.config.get("model_type") == "hfprune":
            return "per_layer"
        if self.config.get("block_configs"):
            return "nemotron_nas"
        return "padded" if self._differs() else "uniform"

    def _differs(self) -> bool:
        """Returns whether the plan leaves the layers that stay different numbers of units of a kind."""
        if self.plan is None:
            return False
        removed, absent, kept = self.plan.removed_layers(), self.plan.absent(), dict[str, set[int]]()
        for group in self.plan.groups:
            stays = group.layer not in removed if group.kind in SUBLAYERS else group.name not in absent
            if group.layer is not None and stays:
                kept.setdefault(group.kind, set()).add(len(self.plan.keep[group.name]))
        return any(len(numbers) > 1 for numbers in kept.values())

    @property
    def base(self) -> str | None:
        """The dense model as the run named it: a path or a hub id; None if it is not recorded."""
        named = (self.provenance.get("model") or {}).get("path")
        return str(named) if named else None

    def stages(self) -> dict[str, dict[str, Any]]:
        """Returns stage -> figures, the dense model first."""
        found = self.report.get("stages") or {}
        return {str(name): figures for name, figures in found.items() if isinstance(figures, dict)}

    def stage(self, *, adapter: bool = False) -> str | None:
        """Returns the stage whose figures are those of the model in the folder.

        Args:
            adapter: The model with the adapter. Without it, a model whose adapter was not merged is the pruned one.
        """
        names = [name for name in self.stages() if not name.startswith("dense")]
        unmerged = self.adapter is not None and not adapter
        if unmerged and "pruned" in names:
            return "pruned"
        return names[-1] if names else None

    def shown_stages(self, *, adapter: bool = False) -> dict[str, dict[str, Any]]:
        """Returns the stages up to the model's own, see :meth:`stage`."""
        names, own = list(self.stages()), self.stage(adapter=adapter)
        last = names.index(own) + 1 if own is not None else len(names)
        return {name: self.stages()[name] for name in names[:last]}


def open_folder(path: str, *, argument: str = "folder", loading: LoadingOptions | None = None) -> PrunedFolder:
    """Returns what a folder or a repository of the hub holds.

    Args:
        path: ``OUT``, ``OUT/model``, ``OUT/adapter``, any model folder, a plan package, or a hub id.
        argument: The argument that gave it, for the message.
        loading: Revision, subfolder, token and others.

    Raises:
        ConfigError: There is no model and no plan, or a file is damaged.
        PlanError: The plan is damaged.
    """
    loading, folder = LoadingOptions.of(loading), Path(user_path(path, argument))
    folder = Path(loading.within(str(folder if folder.is_dir() else _fetched(path, argument, loading))))
    if (folder / MODEL_FOLDER / _CONFIG).is_file():
        return _opened(path, folder / MODEL_FOLDER, folder)
    if (folder / _CONFIG).is_file():
        run = folder.absolute().parent
        return _opened(path, folder, run if folder.name == MODEL_FOLDER else None)
    if (folder / _ADAPTER_CONFIG).is_file():
        run = folder.absolute().parent
        if (run / MODEL_FOLDER / _CONFIG).is_file():
            return _opened(path, run / MODEL_FOLDER, run)
        raise ConfigError(f"{argument}='{path}' holds an adapter without the pruned model: give the folder of the run.")
    if (folder / PLAN_FILE).is_file():
        return PrunedFolder(
            given=path, model=folder, plan=PruningPlan.load(folder), report=read_object(folder / REPORT_FILE)
        )
    raise ConfigError(
        f"{argument}='{path}' holds neither a model (config.json, or {MODEL_FOLDER}/config.json) nor a plan."
    )


def _opened(given: str, model: Path, run: Path | None) -> PrunedFolder:
    plan = PruningPlan.load(model) if (model / PLAN_FILE).is_file() else None
    adapter = run / ADAPTER_FOLDER if run is not None and (run / ADAPTER_FOLDER / _ADAPTER_CONFIG).is_file() else None
    report = read_object(run / REPORT_FILE) if run is not None else {}
    return PrunedFolder(
        given=given, model=model, adapter=adapter, config=read_object(model / _CONFIG), plan=plan, report=report
    )


def _fetched(repo: str, argument: str, loading: LoadingOptions) -> Path:
    """Returns the folder of a repository's small files in the hub's cache."""
    if not _HUB_ID.fullmatch(repo) or repo.startswith((".", "/", "~")):
        raise ConfigError(f"{argument}='{repo}' does not exist, and it is not of the form of a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = loading.patterns(*_HUB_FILES)
        return Path(snapshot_download(repo, allow_patterns=wanted, **loading.repository()))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{argument}='{repo}': no such folder, and the hub gave none: {hub_reason(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a file; empty where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' cannot be read: {first_line(error)}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' holds a {type(found).__name__} where an object is expected.")
    return found


def hub_id(model: str | None) -> str | None:
    """Returns the id of a model on the hub; None for a folder that does not say which model it is.

    >>> hub_id("org/model"), hub_id("/data/models--org--model/snapshots/0a1b"), hub_id("smollm2-135m"), hub_id("./x")
    ('org/model', 'org/model', 'HuggingFaceTB/SmolLM2-135M-Instruct', None)
    """
    if model is None:
        return None
    if model in _EMBEDDED:
        return _EMBEDDED[model]
    if cached := _CACHED.search(model):
        return f"{cached[1]}/{cached[2]}"
    return model if _HUB_ID.fullmatch(model) and model[0] != "." and not os.path.exists(model) else None


def hub_dataset(source: str) -> str | None:
    """Returns the id of a data set on the hub; None for files, folders and text that comes with hfprune.

    >>> hub_dataset("allenai/c4:en:train"), hub_dataset("data/c4.jsonl"), hub_dataset("builtin")
    ('allenai/c4', None, None)
    """
    name = source.partition(":")[0]
    if not _HUB_ID.fullmatch(name) or name[0] == "." or Path(name).suffix in _DATA_FILES or os.path.exists(name):
        return None
    return name
