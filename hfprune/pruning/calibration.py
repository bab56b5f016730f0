"""Calibration loop: runs the calibration batches and accumulates the sums of one or several criteria."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor

from hfprune.allocation import KeptHistory
from hfprune.allocation.convergence import Select
from hfprune.criteria import ActivationCriterion, CalibratedCriterion
from hfprune.models.forward import as_batch
from hfprune.models.forward import sequences as split
from hfprune.objectives import Objective
from hfprune.plan import Group
from hfprune.pruning.accumulator import ImportanceAccumulator, backward
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.options import CalibrationOptions
from hfprune.pruning.prunable import Prunable
from hfprune.pruning.rounds import Kept, State
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.progress import Advance, calibration_progress
from hfprune.utils.random_numbers import isolated_rng
from hfprune.utils.shares import owner_of


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Calibration batches that can be read several times.

    Attributes:
        batches: Function that returns all batches; called once per pass.
        seed: Seed of the loader's shuffling and augmentation.
        summary: Function from a role (``calibration``, ``recovery``) to the provenance of its data, or None.
    """

    batches: Callable[[], Iterable[Any]]
    seed: int = 0
    summary: Callable[[str], Any] = lambda role: None

    @property
    def fingerprint(self) -> Any:
        """Hash of the calibration data; None if unknown."""
        found = self.summary("calibration")
        return found.get("sha256") if isinstance(found, dict) else None

    def share(
        self, communicator: Communicator, *, limit: int | None = None, sequences: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Returns this rank's sequences, see :func:`~hfprune.utils.shares.owner_of`.

        Args:
            communicator: The processes.
            limit: Maximum number of batches.
            sequences: Maximum number of sequences of all ranks together.

        Returns:
            Sequences with ``input_ids`` [1, T].
        """
        seed_data(self.seed)
        every = (sequence for batch in islice(self.batches(), limit) for sequence in split(as_batch(batch)))
        rank, world_size = communicator.rank, communicator.world_size
        return [item for i, item in enumerate(islice(every, sequences)) if owner_of(i, world_size) == rank]


@dataclass(frozen=True)
class Scorer:
    """A criterion with its groups and objective.

    Attributes:
        criterion: The criterion.
        groups: Groups to score.
        objective: Objective to differentiate; None for the model's own, and for criteria without an objective.
    """

    criterion: CalibratedCriterion
    groups: tuple[Group, ...]
    objective: Objective | None = None

    @property
    def forward_only(self) -> bool:
        """Whether the criterion needs no backward pass."""
        return isinstance(self.criterion, ActivationCriterion)


@dataclass(frozen=True)
class _Turn:
    """The item of this rank in one round of ``world_size`` items."""

    index: int
    item: Any
    runs: bool
    """Whether the rank runs the item."""
    counts: bool
    """Whether the scores of the item count."""
    full: bool
    """Whether every rank has an item."""
    done: int
    """Number of items of all ranks after the round."""


def _turns(items: Iterable[Any], first: int, *, rank: int, world_size: int, in_step: bool) -> Iterator[_Turn]:
    """Yields the turns of a rank. Item i, counted from ``first``, belongs to rank ``i mod world_size``.

    Args:
        items: All items.
        first: Number of items to skip.
        rank: The rank.
        world_size: Number of ranks.
        in_step: Whether ranks without an item in an incomplete last round run the item of another rank, not counted.
    """
    own: tuple[int, Any] | None = None
    slot, index, item = world_size - 1, first - 1, None
    for index, item in enumerate(islice(items, first, None), start=first):
        slot = owner_of(index - first, world_size)
        if slot == rank:
            own = index, item
        if slot == world_size - 1:
            assert own is not None
            yield _Turn(*own, runs=True, counts=True, full=True, done=index + 1)
            own = None
    if slot < world_size - 1:
        number, last = own or (index, item)
        counts = own is not None
        yield _Turn(number, last, runs=counts or in_step, counts=counts, full=False, done=index + 1)


class Calibration:
    """Runs the calibration items and accumulates the sums of one or several criteria.

    Item i of the data, counted over all ranks, belongs to rank ``i mod world_size``: every item runs once for any
    number of processes. :meth:`state` holds the sums of all ranks and the position, so that a run can resume with
    another number of processes.

    Args:
        model: Model to score.
        scorers: The criteria. Several criteria share the forward pass and the logits; convergence is then not tracked.
        data: The calibration data.
        options: Calibration options.
        communicator: The processes.
        widths: Number of kept units of each group, or a function that selects them, for the convergence history.
        masked: Units of each group that are not masked during this pass; saved in checkpoints.
        progress: Show a progress bar.

    Raises:
        ConfigError: A criterion cannot score its groups.
    """

    def __init__(
        self,
        model: Prunable,
        scorers: Sequence[Scorer],
        data: CalibrationData,
        options: CalibrationOptions,
        communicator: Communicator,
        *,
        widths: Sequence[int] | Select = (),
        masked: Kept | None = None,
        progress: bool = False,
    ) -> None:
        self._model, self._scorers, self._data, self._options = model, tuple(scorers), data, options
        self._communicator, self._progress = communicator, progress
        self._masked = None if masked is None else {name: list(kept) for name, kept in masked.items()}
        self._batches = data.batches()
        self.accumulators = [
            ImportanceAccumulator(model.model, s.groups, s.criterion, root=model.module, device=model.device)
            for s in self._scorers
        ]
        self._shared = len(self._scorers) > 1 or any(scorer.objective is not None for scorer in self._scorers)
        comparable = len(self._scorers) == 1 and not self.accumulator.has_moments
        self._check_every = options.check_every if comparable else None
        self._settings = options.settings() | {
            "criterion": self._scorers[0].criterion.describe(),
            "objective": self._objective_name,
            "data": data.fingerprint,
        }
        self.history = KeptHistory(self._scorers[0].groups, widths)
        self.stability: float | None = None
        """Share of the kept units that are unchanged between the last two comparisons."""
        self.stopped = False
        """Whether the calibration stopped early."""
        self.seen = SeenTokens()
        self.position = 0
        """Number of finished items of all ranks."""
        self._unchanged = 0  # successive comparisons with unchanged kept units

    @property
    def accumulator(self) -> ImportanceAccumulator:
        """The sums of the first criterion."""
        return self.accumulators[0]

    @property
    def item(self) -> str:
        """What an item is: a sequence, or a batch."""
        return "sequence" if self._options.exact and self._model.reads_tokens else "batch"

    @property
    def _objective_name(self) -> str | None:
        """Name of the differentiated objective; None without a backward pass."""
        scorer = self._scorers[0]
        if scorer.forward_only:
            return None
        return scorer.objective.name if scorer.objective is not None else self._model.objective_name

    # ---- saving and resuming -----------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Returns every sum of this rank in a fixed order."""
        return [tensor for accumulator in self.accumulators for tensor in accumulator.tensors()]

    def state(self) -> State:
        """Returns the sums of all ranks, the position and the settings, as plain data. Collective."""
        history = {"history": self.history.state(), "calm": self._unchanged}
        found = {"position": self.position, "sums": self._summed(), "settings": self._settings, **history}
        return found | {"first_stage": self._masked, "tokens": self._all_seen()}

    def load(self, state: State) -> None:
        """Resumes an interrupted pass.

        Args:
            state: Result of :meth:`state`.

        Raises:
            ConfigError: The pass had other settings or other data.
        """
        for name, stored in state["settings"].items():
            if stored != self._settings.get(name):
                raise ConfigError(
                    f"The checkpoint was written while calibrating with {name} {stored}; this run has "
                    f"{self._settings.get(name)}. Resume with the same setting, or start again."
                )
        self.history.load(state["history"])
        self._unchanged = state["calm"]
        # the sums are those of all ranks; checkpoints of earlier versions have no token count
        self.resume(state["position"], state["sums"], state.get("tokens"))

    def resume(self, position: int, sums: Sequence[Tensor], tokens: int | None = None) -> None:
        """Continues after ``position`` items; rank 0 loads the sums of all ranks.

        Args:
            position: Number of finished items of all ranks.
            sums: Result of :meth:`tensors`, added up over ranks.
            tokens: Number of tokens read so far; None if unknown.
        """
        self.position = position
        if self._communicator.rank == 0:
            self._load(sums)
            self.seen = SeenTokens(tokens)

    def _load(self, sums: Sequence[Tensor]) -> None:
        rest = iter(sums)
        for accumulator in self.accumulators:
            accumulator.load([t.to(self._model.device) for t in islice(rest, len(accumulator.tensors()))])

    def _summed(self) -> list[Tensor]:
        """Returns the sums over all ranks; exact sums do not depend on the distribution of the items."""
        return [self._communicator.sum(tensor).cpu() for tensor in self.tensors()]

    def _all_seen(self) -> int | None:
        """Returns the number of tokens read by all ranks; None if unknown. Collective."""
        own = torch.tensor([self.seen.number, int(self.seen.unknown)], dtype=torch.int64, device=self._model.device)
        number, unknown = self._communicator.sum(own).tolist()
        return None if unknown else int(number)

    # ---- the pass ----------------------------------------------------------------------------------------------------

    def run(self, save: Callable[[], None] = lambda: None) -> ImportanceAccumulator:
        """Runs the remaining items; afterwards every rank holds the sums of all ranks.

        Args:
            save: Function that saves progress, called about every ``checkpoint_every`` items.

        Returns:
            The sums of the first criterion.
        """
        every, saved = self._options.checkpoint_every, self.position
        communicator, bar = self._communicator, self._progress and self._communicator.rank == 0
        with ExitStack() as stack:
            stack.enter_context(isolated_rng())
            for accumulator in self.accumulators:
                stack.enter_context(accumulator.recording())
            advance = stack.enter_context(
                calibration_progress(self._expected(), objective=self._objective_name, enabled=bar)
            )
            seed_data(self._data.seed)
            rank, world_size, in_step = communicator.rank, communicator.world_size, self._model.sharded
            for turn in _turns(self._items(), self.position, rank=rank, world_size=world_size, in_step=in_step):
                if turn.runs:
                    self._step(turn, advance)
                before, self.position = self.position, turn.done
                if not turn.full or self._compare(before):
                    break
                if every and self.position - saved >= every:
                    saved = self.position
                    save()
        self._load(self._summed())
        self.seen = SeenTokens(self._all_seen())
        return self.accumulator

    def scores(self) -> list[dict[str, Tensor]]:
        """Returns group name -> importance [U] for every criterion."""
        return [accumulator.scores() for accumulator in self.accumulators]

    def _compare(self, before: int) -> bool:
        """Compares the kept units with those of the previous comparison if it is due; returns whether to stop."""
        every = self._check_every
        if every is None or self.position // every == before // every:
            return False
        own = [tensor.clone() for tensor in self.tensors()]
        self._load(self._summed())
        seen = self._all_seen()
        total = self.accumulator.totals().num_tokens if seen is None else seen
        self.stability = self.history.add(total, self.accumulator.scores())
        self.accumulator.load(own)
        wanted = self._options.early_stop_overlap
        unchanged = wanted is not None and self.stability is not None and self.stability >= wanted
        self._unchanged = self._unchanged + 1 if unchanged else 0
        self.stopped = self._unchanged >= 2
        return self.stopped

    def _items(self) -> Iterator[Any]:
        for batch in islice(self._batches, self._options.batches):
            yield from self._model.items(batch, exact=self._options.exact)

    def _expected(self) -> int | None:
        """Returns the number of items of this rank; None if unknown."""
        batches: Any = self._batches
        try:
            number = min(len(batches), self._options.batches or len(batches))
        except (TypeError, NotImplementedError):
            return None
        rows = getattr(batches, "batch_size", None) if self._options.exact and self._model.reads_tokens else 1
        return None if rows is None else -(-(number * rows - self.position) // self._communicator.world_size)

    def _step(self, turn: _Turn, advance: Advance) -> None:
        model, index = self._model, turn.index
        item = model.to_device(turn.item)
        try:
            with model.forward_context():
                if self._shared:
                    tokens = self._run_shared(item, index, count=turn.counts)
                elif self._scorers[0].forward_only:
                    counts = model.token_counts(item)
                    tokens = self.accumulator.observe(lambda: model.forward(item, index), *counts, count=turn.counts)
                else:
                    _, tokens = self.accumulator.step(lambda: model.objective_sum(item, index), count=turn.counts)
        except CalibrationError as error:
            raise CalibrationError(f"Calibration {self.item} {index}: {error}") from error
        seen = model.seen_tokens(item, tokens)
        if turn.counts:
            self.seen.add(seen)
        advance(seen or 0, self.accumulator.mean_objective, self.stability)

    def _run_shared(self, item: Any, index: int, *, count: bool) -> int:
        """Runs one forward pass for all criteria and a backward pass per objective; returns the number of tokens."""
        num_tokens, padding = self._model.token_counts(item)
        number = int(num_tokens.sum())
        pairs = list(zip(self._scorers, self.accumulators, strict=True))
        passive = [accumulator for scorer, accumulator in pairs if scorer.forward_only]
        by_objective: dict[Objective, list[ImportanceAccumulator]] = {}
        for scorer, accumulator in pairs:
            if not scorer.forward_only:
                objective = scorer.objective or self._model.objective
                assert objective is not None
                by_objective.setdefault(objective, []).append(accumulator)
        for accumulator in passive:
            accumulator.arm(num_tokens, padding, count=count and number > 0)
        if by_objective:
            self._differentiate(item, by_objective, count=count)
        else:
            self._model.forward(item, index)
        for accumulator in passive:
            accumulator.commit(torch.zeros((), device=self._model.device))
        return number

    def _differentiate(
        self, item: Any, by_objective: Mapping[Objective, list[ImportanceAccumulator]], *, count: bool
    ) -> None:
        with torch.enable_grad():
            sums = self._model.objective_sums(item, list(by_objective))
            for number, (objective, out) in enumerate(zip(by_objective, sums, strict=True), start=1):
                try:
                    backward(out, by_objective[objective], count=count, retain_graph=number < len(sums))
                except CalibrationError as error:
                    raise CalibrationError(f"{objective.name}: {error}") from error


class SeenTokens:
    """Counter of the tokens that the model reads in calibration, including those that the objective does not count.

    Args:
        number: Initial count; None if unknown.
    """

    def __init__(self, number: int | None = 0) -> None:
        self.number, self.unknown = number or 0, number is None

    @property
    def total(self) -> int | None:
        """Number of tokens; None if unknown."""
        return None if self.unknown else self.number

    def add(self, tokens: int | None) -> None:
        """Adds the tokens of an item; None makes the count unknown."""
        self.number += tokens or 0
        self.unknown |= tokens is None


# ---- random numbers --------------------------------------------------------------------------------------------------


def seed_data(seed: int) -> None:
    """Seeds the random number generators of torch, NumPy and Python, which loaders shuffle and augment with."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
