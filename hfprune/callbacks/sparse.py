"""SparsePruningCallback: unstructured and N:M pruning, layer by layer."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from hfprune import _moved
from hfprune.allocation import ResolvedBudget
from hfprune.callbacks.base import PruningCallback
from hfprune.callbacks.calibration_data import check_source, data_loader, data_summary
from hfprune.callbacks.checks import check_positive
from hfprune.callbacks.communicator import LightningCommunicator, say
from hfprune.callbacks.resume import check_settings, resumed_from
from hfprune.callbacks.target import Target
from hfprune.callbacks.user_module import find_target
from hfprune.models import class_name, find_spec
from hfprune.models.contexts import evaluating
from hfprune.models.fingerprint import fingerprint
from hfprune.models.forward import as_batch, sequences
from hfprune.models.groups import find_layers
from hfprune.models.skip_layers import SkipLayers, SkipPatterns
from hfprune.modules.resume import data_fingerprint
from hfprune.plan import PruningPlan
from hfprune.pruning.calibration import seed_data
from hfprune.recovery.masked import hold_zeros
from hfprune.recovery.mode import RecoverySetting
from hfprune.sparse import SavedLayers, SparseAllocation, SparseGPT, SparseMethod, Sparsity, sparse_method
from hfprune.sparse.engine import Offload, check_sparse, prune_sparse
from hfprune.sparse.layer import SparseLayer
from hfprune.sparse.state import LayerState
from hfprune.utils.deprecation import old_keyword
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.files import OwnFolder
from hfprune.utils.progress import sparse_progress
from hfprune.utils.random_numbers import isolated_rng
from hfprune.utils.shares import owner_of
from hfprune.utils.versions import versions


def sparsity_summary(layers: list[SparseLayer]) -> dict[str, Any]:
    """Returns the numbers of zeros and weights, in total and per layer and matrix, as plain data."""
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
    """Raises ``ConfigError`` unless every rank holds the full model, as on a single device and under DDP."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"{method} runs layer by layer, which is not supported under {type(strategy).__name__}. Use a single "
            "device or DDP, with offload='cpu' or 'disk' if memory is short."
        )


def calibration_share(trainer: Trainer, limit: int | None) -> tuple[list[dict[str, Tensor]], str, dict[str, int]]:
    """Returns this rank's calibration sequences, one per batch, and the digest and counts of those of all ranks.

    Args:
        trainer: The trainer, in ``fit``.
        limit: Maximum number of batches.

    Raises:
        CalibrationError: There are fewer sequences than ranks.
    """
    own: list[dict[str, Tensor]] = []
    digest, index, tokens = hashlib.sha256(), 0, 0
    for batch in islice(data_loader(trainer), limit):
        for sequence in sequences(as_batch(batch)):
            ids = sequence["input_ids"]
            digest.update(f"{ids.numel()} ".encode() + ids.cpu().to(torch.int64).numpy().tobytes())
            if owner_of(index, trainer.world_size) == trainer.global_rank:
                own.append({"input_ids": ids})
            index, tokens = index + 1, tokens + ids.numel()
    if index < trainer.world_size:  # raised on every rank
        raise CalibrationError(
            f"Calibration has {index} sequences for {trainer.world_size} processes: each needs at least one."
        )
    return own, digest.hexdigest()[:16], {"sequences": index, "tokens": tokens}


@contextmanager
def _model_on_cpu(model: nn.Module, offload: Offload | None, device: torch.device) -> Iterator[None]:
    """Keeps the model in CPU memory while its layers are moved to the accelerator one at a time."""
    if offload is None or device.type == "cpu":
        yield
        return
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


def _saved_layers(state_dir: str | Path | None, fresh: bool) -> SavedLayers | None:
    return None if state_dir is None else SavedLayers(folder=state_dir, fresh=fresh)


class SparsePruningCallback(PruningCallback):
    """Sets single weights, or N:M groups of weights, to zero in ``on_fit_start``, before training.

    Calibration sequences run one at a time with exact sums, so that the zeros do not depend on the batch size or the
    number of processes. The module is a ``PruningModule``, or any LightningModule with one supported Hugging Face
    model, on a single device or under DDP.

    Args:
        method: A method of :mod:`hfprune.sparse`, or its name: ``wanda``, ``sparsegpt``, ...
        sparsity: Share of zeros (``0.5``), or n zeros in every m consecutive inputs (``2:4``).
        update: ``sparsegpt``, or a ``SparseGPT(...)``: adjusts the remaining weights of each matrix to compensate for
            the removed ones, with any method.
        allocation: Distribution of the zeros over matrices: ``OutlierWeighed()``, ``ExplicitSparsity({...})``, or the
            same share for every matrix if not given.
        recovery: ``"lora"`` or a ``LoraRecovery`` (adapters), ``"full"`` (all weights), ``"mlp"`` (projections of the
            MLPs) or ``"none"``; see :class:`~hfprune.recovery.mode.RecoveryMode`.
        keep_zeros: Whether pruned weights remain zero during recovery, including after adapters are merged.
        calibration_batches: Maximum number of calibration batches; required if the training data are used.
        offload: Where hidden states are kept between layers: ``cpu`` or ``disk``, with only one layer of the model on
            the accelerator, or None for the device of the model.
        state_dir: Folder for finished layers, from which an interrupted run continues, or None. A
            :class:`~hfprune.sparse.SavedLayers` can discard the layers of an earlier run.
        skip_layers: Layers and modules whose weights stay as they are: indices, ranges, name patterns, or a
            :class:`~hfprune.SkipLayers`. ``sparsity`` is the share of zeros of the other projections.
        model: Name of the Hugging Face model in a user-defined module with several models.

    Raises:
        ConfigError: A value is out of range, the method is unknown, or arguments are mutually exclusive.

    Example:
        >>> callback = SparsePruningCallback(method="wanda", sparsity="2:4", calibration_batches=32)
        >>> callback.describe()["sparsity"]
        '2:4'
    """

    prunes: ClassVar[Literal["units", "weights"]] = "weights"

    @old_keyword("fresh", "state_dir", "state_dir=SavedLayers(folder=..., fresh=True)", _saved_layers)
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
        state_dir: str | Path | SavedLayers | None = None,
        skip_layers: SkipLayers | SkipPatterns | None = None,
        model: str | None = None,
    ) -> None:
        check_positive(calibration_batches=calibration_batches)
        super().__init__(recovery=recovery)
        adapters = self.recovery
        if adapters is not None and adapters.dora and keep_zeros:
            raise ConfigError(
                "recovery with dora=True scales whole columns, so that zeros cannot be kept: use dora=False "
                "or keep_zeros=False."
            )
        if adapters is not None and adapters.init == "pissa" and keep_zeros:
            raise ConfigError(
                "recovery with init='pissa' subtracts singular directions from the weights, zeros included: use "
                "init='default' or keep_zeros=False."
            )
        self.method = sparse_method(method) if isinstance(method, str) else method
        self.sparsity = Sparsity.parse(sparsity)
        if isinstance(update, str) and update != "sparsegpt":
            raise ConfigError(f"update='{update}' is unknown. Known: sparsegpt.")
        self.update = SparseGPT() if isinstance(update, str) else update
        self.allocation, self.keep_zeros = allocation, keep_zeros
        self.calibration_batches, self.offload = calibration_batches, offload
        saved = state_dir if isinstance(state_dir, SavedLayers | None) else SavedLayers(folder=state_dir)
        self.state_dir = None if saved is None else Path(saved.folder)
        self.fresh = saved is not None and saved.fresh
        self.model, self.skip_layers = model, SkipLayers.of(skip_layers)
        self.layers: list[SparseLayer] = []
        """The error and the zeros of each layer, after pruning."""
        self._hooks: list[Any] = []

    @property
    def orders(self) -> dict[str, Tensor]:
        """Input orders of permuted projections, by ``LAYER.NAME``."""
        return {f"{layer.index}.{name}": order for layer in self.layers for name, order in layer.orders.items()}

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the zeros, as plain data."""
        return {
            "method": self.method.describe(),
            "sparsity": str(self.sparsity),
            "update": self.update.describe() if self.update else None,
            "allocation": self.allocation.describe() if self.allocation else None,
        } | ({} if self.skip_layers is None else {"skip_layers": self.skip_layers.describe()})

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, module: LightningModule) -> ResolvedBudget | None:
        """Checks the settings against the shapes of ``module``'s model; returns None, without a budget of units.

        Raises:
            ConfigError: The settings are impossible for the model.
            UnsupportedArchitectureError: The model's class is unknown.
        """
        target = self._find(module)
        if target.known:
            model = target.shapes()
            find_spec(model)
            check_sparse(model, self.method, self.sparsity, self.allocation, self.update, self.skip_layers)
        return None

    def check_stock(self, module: LightningModule) -> None:
        """Accepts every model: its shapes do not change."""

    def _find(self, module: LightningModule) -> Target:
        return find_target(module, objective="entropy", model=self.model, neurons=())

    def _check_run(self, trainer: Trainer, target: Target) -> None:
        check_sparse_strategy(trainer, type(self.method).__name__)
        check_source(trainer, limit=self.calibration_batches)
        if self.state_dir is not None:
            OwnFolder(self.state_dir).check("state_dir")

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        self._settings = _data_settings(trainer)
        super()._save(trainer, checkpoint)

    # ---- the work ----------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, target: Target) -> None:
        if target.plan is None:
            return
        before = target.plan.provenance.get("sparse")
        if before != _plain(self.describe()):
            raise ConfigError(f"The checkpoint was pruned with {before}; this run asks for {self.describe()}.")
        if self._record is not None:
            check_settings(self._record, _data_settings(trainer))
        say(trainer, f"Resumed a sparse model{resumed_from(trainer)}: no calibration.")

    def _make_plan(self, trainer: Trainer, target: Target) -> PruningPlan:
        start = time.perf_counter()
        plan = self._plan(trainer, target, self._layers(trainer, target))
        weights, zeros = plan.provenance["sparsity"]["weights"], plan.provenance["sparsity"]["zeros"]
        seconds = time.perf_counter() - start
        say(trainer, f"Made {zeros:,} of {weights:,} weights zero ({zeros / weights:.2%}) in {seconds:.1f} s.")
        return plan

    def _ready(self, trainer: Trainer, target: Target, *, pruned: bool) -> None:
        if self.keep_zeros:
            self._hooks = hold_zeros(target.model)

    def _detach(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        super()._detach()

    def _finish(self, trainer: Trainer) -> None:
        if self.state_dir is not None and trainer.is_global_zero:
            OwnFolder(self.state_dir).clear()

    def _layers(self, trainer: Trainer, target: Target) -> dict[str, Any]:
        """Prunes layer by layer; returns the provenance of the calibration data."""
        strategy, model = trainer.strategy, target.model
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        home = _model_on_cpu(model, self.offload, strategy.root_device)
        with isolated_rng(), evaluating(target.module), torch.no_grad(), home:
            seed_data(target.record("calibrating", None).seed)
            batches, digest, counts = calibration_share(trainer, self.calibration_batches)
            work = prune_sparse(
                model,
                batches,
                self.method,
                self.sparsity,
                allocation=self.allocation,
                update=self.update,
                skip_layers=self.skip_layers,
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
            say(trainer, f"Resumed after layer {resumed - 1}: {resumed} layers were finished.")
        return {**counts, "digest": digest, "data": data_summary(trainer, "calibration")}

    def _open_state(self, trainer: Trainer, target: Target, digest: str) -> LayerState | None:
        if self.state_dir is None:
            return None
        model = {"model": fingerprint(target.model), "precision": str(trainer.precision), "data": digest}
        writer, broadcast = trainer.is_global_zero, trainer.strategy.broadcast
        return LayerState(self.state_dir, self.describe() | model, fresh=self.fresh, writer=writer, broadcast=broadcast)

    def _plan(self, trainer: Trainer, target: Target, calibration: dict[str, Any]) -> PruningPlan:
        """Returns a plan that removes no units and records the zeros."""
        plan = PruningPlan(
            model_class=class_name(target.model),
            groups=(),
            keep={},
            config={},
            provenance={
                "budget": {"asked": ", ".join(map(str, filter(None, (f"sparsity={self.sparsity}", self.skip_layers))))},
                "criterion": self.method.describe(),
                "sparse": _plain(self.describe()),
                "skip_layers": None if self.skip_layers is None else self.skip_layers.describe(),
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


def _data_settings(trainer: Trainer) -> dict[str, Any]:
    return {"calibration data": data_fingerprint(trainer, "calibration")}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings after a JSON round trip."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def __getattr__(name: str) -> Any:
    return _moved.renamed(__name__, name)
