"""The callback that sets single weights to zero, one layer at a time."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from hfprune.callbacks.base import average_anew, check_trainer, listeners
from hfprune.callbacks.calibration_data import check_source, data_loader, data_summary
from hfprune.callbacks.checkpointing import CheckpointTap, count_epoch
from hfprune.callbacks.communicator import LightningCommunicator, say
from hfprune.callbacks.resume import check_settings, whence
from hfprune.callbacks.target import Target
from hfprune.callbacks.user_module import find_target
from hfprune.io.checkpoint_record import KEY, Record
from hfprune.models import class_name, find_spec
from hfprune.models.fingerprint import fingerprint
from hfprune.models.forward import as_batch, sequences
from hfprune.models.groups import find_layers
from hfprune.modules.resume import data_fingerprint, keep_cut_epoch
from hfprune.plan import PruningPlan
from hfprune.pruning.calibration import seed_data
from hfprune.pruning.hooks import evaluating
from hfprune.pruning.planner import versions
from hfprune.recovery.masked import hold_zeros, mask_adapters
from hfprune.recovery.mode import RecoveryMode, RecoverySetting
from hfprune.sparse import SparseAllocation, SparseGPT, SparseMethod, Sparsity, sparse_method
from hfprune.sparse.engine import Offload, check_sparse, prune_sparse
from hfprune.sparse.layer import SparseLayer
from hfprune.sparse.state import LayerState
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.files import OwnFolder
from hfprune.utils.progress import sparse_progress


def sparsity_summary(layers: list[SparseLayer]) -> dict[str, Any]:
    """Returns zeros and weights in all, and by layer and matrix, as plain data."""
    found = [
        {
            "layer": layer.index,
            "error": layer.error,
            "matrices": {
                name: {"asked": m.sparsity, "weights": m.weights, "zeros": m.zeros, "permuted": m.permuted}
                for name, m in layer.matrices.items()
            },
        }
        for layer in layers
    ]
    every = [matrix for layer in layers for matrix in layer.matrices.values()]
    weights, zeros = sum(m.weights for m in every), sum(m.zeros for m in every)
    return {"weights": weights, "zeros": zeros, "achieved": zeros / max(weights, 1), "layers": found}


def check_sparse_strategy(trainer: Trainer, method: str) -> None:
    """Raises ``ConfigError`` unless every rank holds the whole model and replaces no parameter."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"{method} goes through the layers one at a time, which is not supported under {type(strategy).__name__}. "
            "Use a single device or DDP; where memory is short, --sparse.offload cpu or disk."
        )


def share(trainer: Trainer, limit: int | None) -> tuple[list[dict[str, Tensor]], str, dict[str, int]]:
    """Returns this rank's calibration sequences, each alone, and the digest and counts of those of all ranks.

    Args:
        trainer: The trainer, in ``fit``.
        limit: Use at most this many batches.

    Raises:
        CalibrationError: There are fewer sequences than ranks.
    """
    mine: list[dict[str, Tensor]] = []
    digest, index, tokens = hashlib.sha256(), 0, 0
    for batch in islice(data_loader(trainer), limit):
        for sequence in sequences(as_batch(batch)):
            ids = sequence["input_ids"]
            digest.update(f"{ids.numel()} ".encode() + ids.cpu().to(torch.int64).numpy().tobytes())
            if index % trainer.world_size == trainer.global_rank:
                mine.append({"input_ids": ids})
            index, tokens = index + 1, tokens + ids.numel()
    if index < trainer.world_size:  # every rank says so
        raise CalibrationError(
            f"Calibration has {index} sequences for {trainer.world_size} processes: each needs at least one."
        )
    return mine, digest.hexdigest()[:16], {"sequences": index, "tokens": tokens}


@contextmanager
def at_home(model: nn.Module, offload: Offload | None, device: torch.device) -> Iterator[None]:
    """Puts the model into the CPU's memory while layers visit the accelerator one at a time."""
    if offload is None or device.type == "cpu":
        yield
        return
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


class SparsityCallback(Callback):
    """Prunes single weights or N:M groups of them in ``on_fit_start``, then hands over to recovery.

    Every sequence of the calibration data is run alone and sums are exact, so that the same weights become zero
    whatever the batch size and the number of processes. It works on a ``PruningModule`` or on any LightningModule that
    contains one supported Hugging Face model, on a single device or under DDP.

    Args:
        method: A method of :mod:`hfprune.sparse`, or its name: ``wanda``, ``sparsegpt``, ...
        sparsity: Share of zeros (``0.5``), or n zeros in every m consecutive inputs (``2:4``).
        update: ``sparsegpt`` lets the weights that stay make up for those that the method dropped, after any method;
            a ``SparseGPT(...)`` does with its block and damping.
        allocation: How many zeros each matrix gets: the same share by default, ``OutlierWeighed()``,
            ``ExplicitSparsity({...})``.
        recovery: What is trained after pruning: ``"lora"`` or a ``LoraRecovery`` (adapters), ``"full"`` (all weights),
            ``"mlp"`` (projections of the MLPs) or ``"none"`` (nothing); see
            :class:`~hfprune.recovery.mode.RecoveryMode`.
        keep_zeros: Zeros stay zero in recovery: adapters change the other weights only, also once merged.
        calibration_batches: Use at most this many batches of the calibration data; needed when these are the training
            data.
        offload: Between layers hidden states wait in the CPU's memory (``cpu``) or in files (``disk``), and only one
            layer of the model at a time is on the accelerator; None keeps everything on the device.
        state_dir: Finished layers wait here, so that the same run goes on behind the last of them; None keeps none. A
            folder that is new, empty or of an earlier run: files of others in it are refused, and never removed.
        fresh: Drop what an earlier run left in ``state_dir``.
        model: Name of the Hugging Face model within a module of your own, needed when it holds several.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        method: SparseMethod | str,
        sparsity: str | float,
        update: SparseGPT | str | None = None,
        allocation: SparseAllocation | None = None,
        recovery: RecoverySetting = "full",
        keep_zeros: bool = True,
        calibration_batches: int | None = None,
        offload: Offload | None = None,
        state_dir: str | Path | None = None,
        fresh: bool = False,
        model: str | None = None,
    ) -> None:
        if calibration_batches is not None and calibration_batches < 1:
            raise ConfigError(f"--sparse.calibration_batches {calibration_batches} is not positive.")
        self.recovery_mode = RecoveryMode(recovery)
        adapters = self.recovery_mode.lora
        if adapters is not None and adapters.dora and keep_zeros:
            raise ConfigError(
                "DoRA scales whole columns, and adapters that leave zeros zero do not: give --sparse.recovery.dora "
                "false, or --sparse.keep_zeros false."
            )
        if adapters is not None and adapters.init == "pissa" and keep_zeros:
            raise ConfigError(
                "PiSSA takes singular directions out of the weights, zeros included: give --sparse.recovery.init "
                "default, or --sparse.keep_zeros false."
            )
        self.method = sparse_method(method) if isinstance(method, str) else method
        self.sparsity = Sparsity.parse(sparsity)
        if isinstance(update, str) and update != "sparsegpt":
            raise ConfigError(f"Unknown update '{update}'. Known: sparsegpt.")
        self.update = SparseGPT() if isinstance(update, str) else update
        self.allocation, self.recovery, self.keep_zeros = allocation, adapters, keep_zeros
        self.calibration_batches, self.offload, self.fresh = calibration_batches, offload, fresh
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.model = model
        self.layers: list[SparseLayer] = []
        """What became of each layer, after pruning."""
        self._target: Target | None = None
        self._record: Record | None = None
        self._tap: CheckpointTap | None = None
        self._failed = False
        self._held: list[Any] = []

    def settings(self) -> dict[str, Any]:
        """Returns what decides which weights become zero, as plain data."""
        return {
            "method": self.method.describe(),
            "sparsity": str(self.sparsity),
            "update": self.update.describe() if self.update else None,
            "allocation": self.allocation.describe() if self.allocation else None,
        }

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, module: LightningModule) -> None:
        """Raises unless the settings fit ``module``'s model, whose shapes alone are read.

        Raises:
            ConfigError: They do not.
            UnsupportedArchitectureError: No table describes the model's class.
        """
        target = self._find(module)
        if target.known:
            model = target.shapes()
            find_spec(model)
            check_sparse(model, self.method, self.sparsity, self.allocation, self.update)

    def _find(self, module: LightningModule) -> Target:
        return find_target(module, objective="entropy", model=self.model, neurons=())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the settings and what is around the callback, before any weight is loaded."""
        self._target, self._failed, self._record = self._find(pl_module), False, None
        if stage == "fit":
            self.recovery_mode.start(trainer, pl_module)
            check_trainer(trainer, pl_module, pruned=self._target.plan is not None)
            check_sparse_strategy(trainer, type(self.method).__name__)
            check_source(trainer, limit=self.calibration_batches)
            self.check(pl_module)
            self._target.check_recovery(self.recovery)
            if self.state_dir is not None:
                OwnFolder(self.state_dir).check("state_dir")
        self._tap = CheckpointTap(trainer, saving=lambda c: self._save(trainer, c), loaded=self._load)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps count of epochs across resumes."""
        count_epoch(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the strategy back as it was; what ``fit`` was to leave is there, so finished layers are not needed."""
        self._detach()
        self.recovery_mode.end(trainer)
        done = stage == "fit" and not self._failed
        if done and self.state_dir is not None and trainer.is_global_zero:
            OwnFolder(self.state_dir).clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the strategy back as it was."""
        self._detach()
        self.recovery_mode.end(trainer)
        self._failed = True

    def _detach(self) -> None:
        for handle in self._held:
            handle.remove()
        self._held = []
        if self._tap is not None:
            self._tap.detach()
            self._tap = None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        assert self._target is not None
        settings = {"calibration data": data_fingerprint(trainer, "calibration")}
        checkpoint[KEY] = replace(self._target.record("training", None), settings=settings).to_dict()
        keep_cut_epoch(trainer, checkpoint)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        assert self._target is not None
        self._record = record = Record.of(checkpoint)
        if record is not None:
            self._target.replay(record)
            if self.keep_zeros:
                mask_adapters(self._target.model)

    # ---- the work ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prunes, adds adapters and sets the strategy up again."""
        target = self._target
        assert target is not None
        target.check_training(adapters=self.recovery is not None)
        if target.plan is not None:
            made = target.plan.provenance.get("sparse")
            if made != _plain(self.settings()):
                raise ConfigError(f"The checkpoint was pruned with {made}; this run asks for {self.settings()}.")
            if self._record is not None:
                check_settings(self._record, {"calibration data": data_fingerprint(trainer, "calibration")})
            say(trainer, f"Resumed a sparse model{whence(trainer)}: no calibration.")
            anew = target.lacks_adapters(self.recovery, self._record)
            if anew:
                self._adapt(target)
        else:
            target.start(trainer.strategy.broadcast(torch.initial_seed() % 2**32))
            self._prune(trainer, pl_module, target)
            anew = True
        if anew:
            trainer.strategy.model = trainer.lightning_module
            trainer.strategy.setup(trainer)
        if self.keep_zeros:
            self._held = hold_zeros(target.model)

    def _prune(self, trainer: Trainer, module: LightningModule, target: Target) -> None:
        for listener in listeners(trainer):
            listener.on_pruning_start(trainer, module)
        start = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):  # hooks see nothing of compiled modules
            plan = self._plan(trainer, target, self._layers(trainer, target))
        weights, zeros = plan.provenance["sparsity"]["weights"], plan.provenance["sparsity"]["zeros"]
        seconds = time.perf_counter() - start
        say(trainer, f"Made {zeros:,} of {weights:,} weights zero ({zeros / weights:.2%}) in {seconds:.1f} s.")
        target.apply_plan(plan)
        for listener in listeners(trainer):
            listener.on_pruning_end(trainer, module, plan)
        self._adapt(target)
        average_anew(trainer, module)

    def _adapt(self, target: Target) -> None:
        if self.recovery is not None:
            target.add_lora(self.recovery)
            if self.keep_zeros:
                mask_adapters(target.model)

    def _layers(self, trainer: Trainer, target: Target) -> dict[str, Any]:
        """Prunes layer by layer; returns what is told about the calibration data."""
        strategy, model = trainer.strategy, target.model
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        home = at_home(model, self.offload, strategy.root_device)
        with isolate_rng(), evaluating(target.module), torch.no_grad(), home:
            seed_data(target.record("calibrating", None).seed)
            batches, digest, counts = share(trainer, self.calibration_batches)
            work = prune_sparse(
                model,
                batches,
                self.method,
                self.sparsity,
                allocation=self.allocation,
                update=self.update,
                device=strategy.root_device,
                offload=self.offload,
                state=self._open_state(trainer, target, digest),
                reduce=lambda tensor: (
                    LightningCommunicator(trainer).sum(tensor.to(strategy.root_device)).to(tensor.device)
                ),
            )
            self.layers = []
            bar = sparse_progress(len(find_layers(model)), enabled=shown)
            with bar as done, strategy.precision_plugin.forward_context():
                for layer in work:
                    self.layers.append(layer)
                    done(layer.index, layer.error)
        resumed = sum(layer.resumed for layer in self.layers)
        if resumed:
            say(trainer, f"Resumed behind layer {resumed - 1}: {resumed} layers were there.")
        return {**counts, "digest": digest, "data": data_summary(trainer, "calibration")}

    def _open_state(self, trainer: Trainer, target: Target, digest: str) -> LayerState | None:
        if self.state_dir is None:
            return None
        model = {"model": fingerprint(target.model), "precision": str(trainer.precision), "data": digest}
        writer, broadcast = trainer.is_global_zero, trainer.strategy.broadcast
        return LayerState(self.state_dir, self.settings() | model, fresh=self.fresh, writer=writer, broadcast=broadcast)

    def _plan(self, trainer: Trainer, target: Target, calibration: dict[str, Any]) -> PruningPlan:
        """Returns a plan that removes no unit and says what became zero."""
        plan = PruningPlan(
            model_class=class_name(target.model),
            groups=(),
            keep={},
            config={},
            provenance={
                "budget": {"asked": f"--sparsity {self.sparsity}"},
                "criterion": self.method.describe(),
                "sparse": _plain(self.settings()),
                "keep_zeros": self.keep_zeros,
                "sparsity": sparsity_summary(self.layers),
                "model": target.describe(),
                "calibration": calibration,
                "recovery": {"data": data_summary(trainer, "recovery")},
                "versions": versions(),
            },
        )
        shared: PruningPlan = trainer.strategy.broadcast(plan)
        return shared


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
