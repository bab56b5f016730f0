"""Old module paths, which still work for one release with a ``DeprecationWarning``."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MODULES = {
    "hfprune.allocation.fill": "hfprune.allocation.rounding",
    "hfprune.allocation.hidden": "hfprune.allocation.channel_widths",
    "hfprune.allocation.history": "hfprune.allocation.convergence",
    "hfprune.allocation.keep": "hfprune.allocation.base",
    "hfprune.allocation.resolved": "hfprune.allocation.budget",
    "hfprune.arch": "hfprune.models",
    "hfprune.arch.custom": "hfprune.models.groups",
    "hfprune.arch.experts": "hfprune.models.experts",
    "hfprune.arch.gemma": "hfprune.models.architectures",
    "hfprune.arch.gpt2": "hfprune.models.architectures",
    "hfprune.arch.gpt_neox": "hfprune.models.architectures",
    "hfprune.arch.groups": "hfprune.models.groups",
    "hfprune.arch.llama": "hfprune.models.architectures",
    "hfprune.arch.mistral": "hfprune.models.architectures",
    "hfprune.arch.mixtral": "hfprune.models.architectures",
    "hfprune.arch.opt": "hfprune.models.architectures",
    "hfprune.arch.phi3": "hfprune.models.architectures",
    "hfprune.arch.projection": "hfprune.models.projection",
    "hfprune.arch.qwen": "hfprune.models.architectures",
    "hfprune.arch.qwen_moe": "hfprune.models.architectures",
    "hfprune.arch.spec": "hfprune.models.spec",
    "hfprune.arch.stock": "hfprune.models.stock_config",
    "hfprune.arch.stream": "hfprune.models.residual_stream",
    "hfprune.calibration": "hfprune.pruning.accumulator",
    "hfprune.callbacks.calibrate": "hfprune.pruning.calibration",
    "hfprune.callbacks.carry_over": "hfprune.callbacks.base",
    "hfprune.callbacks.curves": "hfprune.pruning.sensitivity_curves",
    "hfprune.callbacks.dense_control": "hfprune.callbacks.snapshots",
    "hfprune.callbacks.distil": "hfprune.pruning.two_stages",
    "hfprune.callbacks.events": "hfprune.callbacks.base",
    "hfprune.callbacks.foreign": "hfprune.callbacks.user_module",
    "hfprune.callbacks.importance": "hfprune.callbacks.structured",
    "hfprune.callbacks.layerwise": "hfprune.pruning.layerwise",
    "hfprune.callbacks.planner": "hfprune.pruning.planner",
    "hfprune.callbacks.progress": "hfprune.utils.progress",
    "hfprune.callbacks.rounds": "hfprune.pruning.rounds",
    "hfprune.callbacks.saving": "hfprune.callbacks.checkpointing",
    "hfprune.callbacks.sparse_run": "hfprune.callbacks.sparse",
    "hfprune.callbacks.stages": "hfprune.callbacks.snapshots",
    "hfprune.callbacks.strategies": "hfprune.callbacks.checks",
    "hfprune.callbacks.units": "hfprune.pruning.planner",
    "hfprune.causal": "hfprune.models.forward",
    "hfprune.checkpoints": "hfprune.io.checkpoint_record",
    "hfprune.commands": "hfprune.cli.launch",
    "hfprune.commands.base": "hfprune.cli.base",
    "hfprune.commands.evaluate": "hfprune.cli.evaluate",
    "hfprune.commands.export": "hfprune.cli.export",
    "hfprune.commands.lora_prune": "hfprune.cli.run",
    "hfprune.commands.run": "hfprune.cli.run",
    "hfprune.commands.sparse": "hfprune.cli.run",
    "hfprune.commands.sweep": "hfprune.cli.sweep",
    "hfprune.criteria.stages": "hfprune.criteria.self_distillation",
    "hfprune.criteria.wanda": "hfprune.criteria.wanda_structured",
    "hfprune.curves": "hfprune.pruning.sensitivity_curves",
    "hfprune.data.bos": "hfprune.data.encode",
    "hfprune.data.checks": "hfprune.data.roles",
    "hfprune.data.layouts": "hfprune.data.formats",
    "hfprune.data.packing": "hfprune.data.examples",
    "hfprune.data.position": "hfprune.data.stream",
    "hfprune.data.sampler": "hfprune.data.loaders",
    "hfprune.data.splits": "hfprune.data.roles",
    "hfprune.data.store": "hfprune.data.examples",
    "hfprune.data.summary": "hfprune.data.text",
    "hfprune.data.token_cache": "hfprune.data.examples",
    "hfprune.data.training": "hfprune.data.loaders",
    "hfprune.data.written": "hfprune.data.self_generated",
    "hfprune.embedded": "hfprune.io.demo_model",
    "hfprune.errors": "hfprune.utils.errors",
    "hfprune.evaluation.hidden": "hfprune.models.forward",
    "hfprune.evaluation.latency": "hfprune.evaluation.size_and_speed",
    "hfprune.evaluation.memory": "hfprune.evaluation.size_and_speed",
    "hfprune.evaluation.samples": "hfprune.evaluation.evaluate",
    "hfprune.evaluation.size": "hfprune.evaluation.size_and_speed",
    "hfprune.evaluation.stage": "hfprune.evaluation.evaluate",
    "hfprune.evaluation.table": "hfprune.report.table",
    "hfprune.evaluation.windows": "hfprune.evaluation.perplexity",
    "hfprune.evaluator": "hfprune.trainer",
    "hfprune.export": "hfprune.io.save",
    "hfprune.fingerprint": "hfprune.models.fingerprint",
    "hfprune.launch": "hfprune.cli.launch",
    "hfprune.layer_scores": "hfprune.pruning.layer_scores",
    "hfprune.layerwise.check": "hfprune.pruning.layerwise",
    "hfprune.layerwise.importance": "hfprune.sparse.weight_taylor",
    "hfprune.layerwise.prune": "hfprune.pruning.layerwise",
    "hfprune.layerwise.saved": "hfprune.sparse.state",
    "hfprune.layerwise.sparse": "hfprune.sparse.engine",
    "hfprune.layerwise.sparse_layer": "hfprune.sparse.layer",
    "hfprune.layerwise.state": "hfprune.sparse.state",
    "hfprune.layerwise.statistics": "hfprune.sparse.statistics",
    "hfprune.layerwise.store": "hfprune.models.layer_stream",
    "hfprune.layerwise.stream": "hfprune.models.layer_stream",
    "hfprune.layouts": "hfprune.io.layouts",
    "hfprune.layouts.apply": "hfprune.io.layouts.apply",
    "hfprune.layouts.base": "hfprune.io.layouts.base",
    "hfprune.layouts.bitmask": "hfprune.io.layouts.bitmask",
    "hfprune.layouts.bitmask_auto": "hfprune.io.layouts.bitmask",
    "hfprune.layouts.cut": "hfprune.io.layouts.base",
    "hfprune.layouts.differing": "hfprune.io.layouts.per_layer",
    "hfprune.layouts.keys": "hfprune.io.layouts.base",
    "hfprune.layouts.padded": "hfprune.io.layouts.stock",
    "hfprune.layouts.per_layer": "hfprune.io.layouts.per_layer",
    "hfprune.layouts.uniform": "hfprune.io.layouts.stock",
    "hfprune.loading": "hfprune.io.load",
    "hfprune.modules.steps": "hfprune.modules.training_step",
    "hfprune.modules.weighting": "hfprune.modules.token_weights",
    "hfprune.moments": "hfprune.utils.second_moments",
    "hfprune.objectives.teacher_top": "hfprune.objectives.top_k",
    "hfprune.packed": "hfprune.models.forward",
    "hfprune.quiet": "hfprune.io.progress",
    "hfprune.reconstruction": "hfprune.utils.least_squares",
    "hfprune.recording": "hfprune.pruning.hooks",
    "hfprune.recovery.hidden_matching": "hfprune.recovery.distillation",
    "hfprune.recovery.lora_importance": "hfprune.criteria.lora_gradient",
    "hfprune.registry": "hfprune.utils.registry",
    "hfprune.saved": "hfprune.io.save",
    "hfprune.sharding": "hfprune.io.load_sharded",
    "hfprune.sparse.ranking": "hfprune.sparse.pattern",
    "hfprune.sparse.taylor": "hfprune.sparse.weight_taylor",
    "hfprune.sums": "hfprune.utils.exact_sums",
    "hfprune.surgery": "hfprune.models.surgery",
    "hfprune.sweep.book": "hfprune.sweep.score_cache",
    "hfprune.sweep.compare": "hfprune.sweep.results",
    "hfprune.tensor_files": "hfprune.utils.files",
    "hfprune.types": "hfprune.plan",
}
"""Old module -> new module of all names that are not in ``NAMES``."""

NAMES = {
    "hfprune.callbacks.calibrate": {
        "check_source": "hfprune.callbacks.calibration_data.check_source",
        "data_loader": "hfprune.callbacks.calibration_data.data_loader",
        "data_summary": "hfprune.callbacks.calibration_data.data_summary",
    },
    "hfprune.callbacks.planner": {
        "PruningOptions": "hfprune.pruning.options.PruningOptions",
        "say": "hfprune.callbacks.communicator.say",
        "warn": "hfprune.callbacks.communicator.warn",
    },
    "hfprune.commands": {},
    "hfprune.data.layouts": {
        "Layout": "hfprune.data.formats.RowFormat",
    },
    "hfprune.evaluation.hidden": {
        "final_hidden": "hfprune.models.forward.window_hidden",
    },
    "hfprune.loading": {
        "load": "hfprune.io.load_any.load",
    },
    "hfprune.layerwise": {
        "LayerState": "hfprune.sparse.state.LayerState",
        "LayerStream": "hfprune.models.layer_stream.LayerStream",
        "LayerwisePass": "hfprune.pruning.layerwise.LayerwisePass",
        "LayerwiseResult": "hfprune.pruning.layerwise.LayerwiseResult",
        "Offload": "hfprune.sparse.engine.Offload",
        "SparseLayer": "hfprune.sparse.layer.SparseLayer",
        "SparseMatrix": "hfprune.sparse.layer.SparseMatrix",
        "check_sparse": "hfprune.sparse.engine.check_sparse",
        "check_together": "hfprune.pruning.layerwise.check_together",
        "matrices_of": "hfprune.sparse.engine.matrices_of",
        "prune_sparse": "hfprune.sparse.engine.prune_sparse",
    },
    "hfprune.packed": {
        "packed_hidden": "hfprune.models.forward.forward_packed",
    },
}
"""Old module -> old name -> new path, for names that were moved elsewhere or renamed."""


RENAMED = {
    "LoraPruneCallback": "hfprune.callbacks.lora_prune.LoraPruningCallback",
    "with_blocks": "hfprune.criteria.layers.with_layers",
    "SparsityCallback": "hfprune.callbacks.sparse.SparsePruningCallback",
}
"""Old public name -> its new path."""


def renamed(module: str, name: str) -> Any:
    """Returns the object of an old public name, with a ``FutureWarning``; for ``__getattr__`` of modules.

    Args:
        module: The module that is asked for the name.
        name: The name.

    Raises:
        AttributeError: The name is unknown.
    """
    if name not in RENAMED:
        raise AttributeError(f"module '{module}' has no attribute '{name}'")
    home, _, new = RENAMED[name].rpartition(".")
    text = f"{name} is now {new}; the old name will be removed in the next release."
    warnings.warn(text, FutureWarning, stacklevel=3)
    return getattr(importlib.import_module(home), new)


class _Names(ModuleType):
    """Old module whose names were moved to several modules or renamed."""

    def __getattr__(self, name: str) -> Any:
        """Imports a name from its new module."""
        known = NAMES[self.__name__]
        if name in known:
            home, _, new = known[name].rpartition(".")
            if not name.startswith("_"):
                _warn(f"{self.__name__}.{name}", known[name])
            return getattr(importlib.import_module(home), new)
        if self.__name__ in MODULES and not name.startswith("__"):
            return getattr(importlib.import_module(MODULES[self.__name__]), name)
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")


class _Loader(Loader):
    def __init__(self, new: str | None) -> None:
        self._new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.name not in NAMES:
            return None
        module = _Names(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self._new is not None and not isinstance(module, _Names):
            sys.modules[module.__name__] = importlib.import_module(self._new)

    def get_code(self, fullname: str) -> CodeType:
        """Returns code for ``python -m`` with the old path."""
        run = f"import runpy; runpy.run_module({self._new!r}, run_name='__main__', alter_sys=True)"
        return compile(run, f"<{fullname}>", "exec")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("hfprune."):
            return None
        new = MODULES.get(fullname)
        if new is None and fullname not in NAMES:
            parent, _, leaf = fullname.rpartition(".")
            if parent not in MODULES:
                return None
            new = f"{MODULES[parent]}.{leaf}"  # a module that never had this path
            if importlib.util.find_spec(new) is None:
                return None
        if new is not None:
            _warn(fullname, new)
        return ModuleSpec(fullname, _Loader(new), is_package=fullname in NAMES)


def install() -> None:
    """Registers the finder of old paths. It costs one dictionary lookup per import that is not cached."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _warn(old: str, new: str) -> None:
    text = f"{old} is now {new}; the old path will be removed in the next release."
    warnings.warn(text, DeprecationWarning, stacklevel=3)
