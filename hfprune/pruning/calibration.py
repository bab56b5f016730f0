"""The calibration loop: batches in, exact sums of a criterion out."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy
import torch
from lightning import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from hfprune.allocation import Allocation, KeptHistory, uniform_keep
from hfprune.allocation.convergence import Select
from hfprune.criteria import ActivationCriterion, CalibratedCriterion, SelfDistillation
from hfprune.objectives import OBJECTIVES
from hfprune.objectives.self_distillation import SelfDistillationObjective
from hfprune.plan import Budget, Group
from hfprune.pruning.accumulator import ImportanceAccumulator
from hfprune.pruning.hooks import UnitMask
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.progress import Advance, calibration_progress

if TYPE_CHECKING:
    from hfprune.callbacks.target import Target


class Calibration:
    """Runs the calibration items and adds up their scores.

    Item i of the data, counted over all ranks, goes to rank ``i mod world_size``, so every item is run once, whatever
    the number of processes; no sampler repeats any. The state that ``state`` returns holds the sums of all ranks and
    the number of items done, so a run can go on with another number of processes.

    Args:
        trainer: The trainer, in ``fit``.
        target: What is scored.
        groups: Its groups.
        criterion: How.
        limit: Use at most this many batches.
        exact: Run each sequence alone, see ``TaylorImportanceCallback``.
        seed: Seed of the loader's shuffling.
        widths: Kept units of each group, or what selects them, for the history of what is kept.
        look_every: Look at the kept units each time that so many items were done.
        stop_at: End when two looks in a row find this share of the kept units unchanged since the look before.
        first_stage: Units that an earlier stage kept, by group, which a checkpoint must carry.
        distillation: The setting that a resumed run must share.
        rounds: Likewise.

    Raises:
        ConfigError: There is no calibration data, the criterion cannot score the groups, or ``stop_at`` is asked of one
            whose sums are too large to be looked at again and again.
    """

    def __init__(  # noqa: PLR0913
        self,
        trainer: Trainer,
        target: "Target",
        groups: tuple[Group, ...],
        criterion: CalibratedCriterion,
        *,
        limit: int | None,
        exact: bool,
        seed: int,
        widths: Sequence[int] | Select = (),
        look_every: int | None = None,
        stop_at: float | None = None,
        first_stage: Mapping[str, Sequence[int]] | None = None,
        distillation: str | None = None,
        rounds: str | None = None,
    ) -> None:
        self._trainer, self._target, self._limit, self._exact, self._seed = trainer, target, limit, exact, seed
        self._look_every, self._stop_at = look_every, stop_at
        self._forward_only = isinstance(criterion, ActivationCriterion)
        self._first_stage = None if first_stage is None else {name: list(kept) for name, kept in first_stage.items()}
        check_source(trainer, limit=limit)
        self._loader = data_loader(trainer)
        self._settings = {
            "criterion": criterion.describe(),
            "objective": self._objective_name,
            "distillation": distillation,
            "rounds": rounds,
            "exact": exact,
            "batches": limit,
            "data": _fingerprint_of_data(trainer),
            "stop_at": stop_at,
        }
        device = trainer.strategy.root_device
        self.accumulator = ImportanceAccumulator(target.model, groups, criterion, root=target.module, device=device)
        if self.accumulator.has_moments:
            self._look_every = None
        self.history = KeptHistory(groups, widths)
        self.stability: float | None = None
        """Share of the kept units that did not change between the last two looks."""
        self.stopped = False
        """Whether the calibration ended early."""
        self.seen = SeenTokens()
        self._calm = 0  # looks in a row that found the units settled
        self._done = 0  # items, over all ranks

    @property
    def _objective_name(self) -> str | None:
        """Name of what is differentiated, None when nothing is."""
        return None if self._forward_only else self._target.objective_name

    # ---- leaving and taking up ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns sums of all ranks, position and settings, as plain data; every rank must ask for it."""
        looks = {"history": self.history.state(), "calm": self._calm}
        found = {"position": self._done, "sums": self._summed(), "settings": self._settings, **looks}
        return found | {"first_stage": self._first_stage, "tokens": self._all_seen()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up a pass that was left.

        Raises:
            ConfigError: It was calibrating with other settings or other data.
        """
        for name, made in state["settings"].items():
            if made != self._settings.get(name):
                raise ConfigError(
                    f"The checkpoint was written while calibrating with {name} {made}; this run has "
                    f"{self._settings.get(name)}. Resume with the same, or start anew."
                )
        self._done = state["position"]
        self.history.load(state["history"])
        self._calm = state["calm"]
        if self._trainer.is_global_zero:  # the sums of all ranks so far, counted once
            device = self._trainer.strategy.root_device
            self.accumulator.load([tensor.to(device) for tensor in state["sums"]])
            self.seen = SeenTokens(state.get("tokens"))  # checkpoints of earlier versions do not say

    def _summed(self) -> list[torch.Tensor]:
        """Returns the sums over all ranks; exact sums do not depend on which rank added what."""
        strategy = self._trainer.strategy
        return [strategy.reduce(t.clone(), reduce_op="sum").cpu() for t in self.accumulator.tensors()]

    def _all_seen(self) -> int | None:
        """Returns the tokens that all ranks have read so far, None where items do not say; every rank must ask."""
        strategy = self._trainer.strategy
        mine = torch.tensor([self.seen.number, int(self.seen.unknown)], dtype=torch.int64, device=strategy.root_device)
        number, unknown = strategy.reduce(mine, reduce_op="sum").tolist()
        return None if unknown else int(number)

    # ---- the pass ----------------------------------------------------------------------------------------------------

    def run(self, *, every: int | None, save: Callable[[], None]) -> ImportanceAccumulator:
        """Runs what is left of the data; afterwards every rank holds the sums of all.

        Args:
            every: Call ``save`` each time that about this many items were done.
            save: Writes a checkpoint.
        """
        trainer = self._trainer
        world, rank = trainer.world_size, trainer.global_rank
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        saved = self._done
        mine: Any = None
        with (
            isolate_rng(),
            self.accumulator.recording(),
            calibration_progress(self._expected(), objective=self._objective_name, enabled=shown) as advance,
        ):
            seed_data(self._seed)
            first, index = self._done, self._done - 1
            item: Any = None
            for index, item in enumerate(islice(self._items(), first, None), start=first):
                slot = (index - first) % world
                if slot == rank:
                    mine = (index, item)
                if slot == world - 1:
                    self._step(*mine, advance=advance)
                    mine, self._done = None, index + 1
                    if self._look(self._done - world):
                        break
                    if every and self._done - saved >= every:
                        saved = self._done
                        save()
            if self._done < index + 1 and not self.stopped:  # the last round is not full
                if mine is not None:
                    self._step(*mine, advance=advance)
                elif self._target.sharded:  # the ranks of a sharded model run it together
                    self._step(index, item, advance=advance, count=False)
                self._done = index + 1
        self.accumulator.load([t.to(trainer.strategy.root_device) for t in self._summed()])
        self.seen = SeenTokens(self._all_seen())
        return self.accumulator

    def _look(self, before: int) -> bool:
        """Looks at the units that would be kept now, where it is time; returns whether they have settled."""
        every = self._look_every
        if every is None or self._done // every == before // every:
            return False
        mine = [tensor.clone() for tensor in self.accumulator.tensors()]
        self.accumulator.load([t.to(self._trainer.strategy.root_device) for t in self._summed()])
        seen = self._all_seen()
        total = self.accumulator.totals().num_tokens if seen is None else seen
        self.stability = self.history.add(total, self.accumulator.scores())
        self.accumulator.load(mine)
        settled = self._stop_at is not None and self.stability is not None and self.stability >= self._stop_at
        self._calm = self._calm + 1 if settled else 0
        self.stopped = self._calm >= 2
        return self.stopped

    def _items(self) -> Iterator[Any]:
        for batch in islice(self._loader, self._limit):
            yield from self._target.items(batch, exact=self._exact)

    def _expected(self) -> int | None:
        """Returns how many items this rank will run, where that is known beforehand."""
        try:
            batches = min(len(self._loader), self._limit or len(self._loader))
        except (TypeError, NotImplementedError):
            return None
        rows = getattr(self._loader, "batch_size", None) if self._exact and self._target.objective else 1
        return None if rows is None else -(-(batches * rows - self._done) // self._trainer.world_size)

    def _step(self, index: int, item: Any, *, advance: Advance, count: bool = True) -> None:
        strategy = self._trainer.strategy
        item = strategy.batch_to_device(item)
        try:
            with strategy.precision_plugin.forward_context():
                if self._forward_only:
                    counts = self._target.token_counts(item)
                    tokens = self.accumulator.observe(lambda: self._target.forward(item, index), *counts, count=count)
                else:
                    _, tokens = self.accumulator.step(lambda: self._target.objective_sum(item, index), count=count)
        except CalibrationError as error:
            kind = "sequence" if self._exact and self._target.objective else "batch"
            raise CalibrationError(f"Calibration {kind} {index}: {error}") from error
        seen = self._target.seen_tokens(item, tokens)
        if count:
            self.seen.add(seen)
        advance(seen or 0, self.accumulator.mean_objective(), self.stability)


class SeenTokens:
    """Tokens that the model has read in calibration, unlike those that its objective counts.

    Args:
        number: Those before; None where items did not say.
    """

    def __init__(self, number: int | None = 0) -> None:
        self.number, self.unknown = number or 0, number is None

    @property
    def total(self) -> int | None:
        """All of them, None where items do not say."""
        return None if self.unknown else self.number

    def add(self, tokens: int | None) -> None:
        """Adds those of an item, None where it does not say."""
        self.number += tokens or 0
        self.unknown |= tokens is None


def check_source(trainer: Trainer, *, limit: int | None) -> None:
    """Raises ``ConfigError`` unless there is calibration data: before any of it is read.

    Args:
        trainer: The trainer, its module and data attached.
        limit: Number of batches to use; needed when the training data serve.
    """
    if _owner(trainer) is not None:
        return
    if not trainer.fit_loop._data_source.is_defined():
        raise ConfigError(
            "TaylorImportanceCallback needs calibration data: a datamodule or module with a calibration_dataloader() "
            "method, or training data with calibration_batches=N."
        )
    if limit is None:
        raise ConfigError(
            "There is no calibration_dataloader(), so the training data calibrate: say how many of its batches with "
            "calibration_batches=N."
        )


def _owner(trainer: Trainer) -> Any:
    """Returns the datamodule or module that has calibration data of its own, None when neither has."""
    owners: list[Any] = [trainer.datamodule, trainer.lightning_module]  # type: ignore[attr-defined]
    return next((o for o in owners if callable(getattr(o, "calibration_dataloader", None))), None)


def data_loader(trainer: Trainer) -> Any:
    """Returns the calibration batches: ``calibration_dataloader()``, or the training batches read afresh.

    The training batches are read as the user's loader gives them, with no distributed sampler put in: each process sees
    the same batches in the same order, and takes its share of them.
    """
    owner = _owner(trainer)
    if owner is not None:
        return owner.calibration_dataloader()
    loader = trainer.fit_loop._data_source.dataloader()
    if isinstance(loader, list | tuple | dict):
        loader = CombinedLoader(loader, "max_size_cycle")
    if isinstance(loader, CombinedLoader):
        return (batch for batch, _, _ in loader)
    return loader


def seed_data(seed: int) -> None:
    """Seeds what a loader may shuffle or augment with."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _fingerprint_of_data(trainer: Trainer) -> Any:
    """Returns what tells the calibration data from others, None when the datamodule tells nothing."""
    summary = data_summary(trainer, "calibration")
    return summary.get("sha256") if isinstance(summary, dict) else None


def data_summary(trainer: Trainer, role: str) -> Any:
    """Returns what the datamodule tells about its data for ``role``, None when it tells nothing."""
    summary = getattr(trainer.datamodule, "summary", None)  # type: ignore[attr-defined]
    return summary().get(role) if callable(summary) else None


Kept = Mapping[str, Sequence[int]]
"""Group -> kept units."""

Pass = Callable[[Kept | None, dict[str, Any] | None], Calibration]
"""Runs the calibration data once: what the first stage kept (in the second), saved state."""


def check_stages(target: "Target", setting: SelfDistillation, budget: Budget, allocation: Allocation | None) -> None:
    """Raises ``ConfigError`` when the stages do not fit what is pruned, before anything is loaded.

    Args:
        target: What is pruned.
        setting: The stages.
        budget: What was asked.
        allocation: How it is spent.
    """
    for name in ("layers", "channels"):
        if name in target.units:
            raise ConfigError(f"distillation cuts units of every layer first: leave '{name}' out of the units.")
    if not target.known:
        return
    resolved = target.resolve(budget, allocation)
    if resolved.provisional:
        raise ConfigError(
            f"distillation needs every width before its first stage, and {allocation} takes them from scores."
        )
    setting.first_widths(target.groups(target.shapes()), resolved.widths)


def two_stages(
    target: "Target",
    groups: tuple[Group, ...],
    setting: SelfDistillation,
    widths: Sequence[int],
    saved: dict[str, Any] | None,
    run: Pass,
) -> Calibration:
    """Returns the finished second stage.

    Args:
        target: What is scored; its objective becomes each stage's.
        groups: Its groups.
        setting: The stages.
        widths: How many units of each group are kept in the end.
        saved: State of a pass that was left, of either stage.
        run: Runs one pass with the target's objective.

    Raises:
        ConfigError: The first stage would keep fewer units than the second.
    """
    first = setting.first_widths(groups, widths)
    kept: Kept | None = saved.get("first_stage") if saved else None
    if kept is None:
        target.objective = OBJECTIVES.get("cross_entropy")
        kept = uniform_keep(run(None, saved).accumulator.scores(), groups, first)
        saved = None
    mask = UnitMask(target.model, groups, kept)
    target.objective = SelfDistillationObjective(
        alpha=setting.alpha, temperature=setting.temperature, unmasked=mask.lifted
    )
    with mask.active():
        return run(kept, saved)
