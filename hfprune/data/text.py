"""TextDataModule: calibration, recovery, validation and evaluation data, with their provenance."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from hfprune.data.build import Builder
from hfprune.data.encode import bos_id, read_template, windows_bos
from hfprune.data.examples import Example, ExampleOptions
from hfprune.data.loaders import Loaders, ResumableDataModule
from hfprune.data.options import BatchOptions, ReadingOptions, SampleOptions, TokenOptions, WindowOptions
from hfprune.data.roles import Role, Roles, check_sources, check_stream, check_values, fill_in
from hfprune.data.self_generated import Author, Writer, author_of
from hfprune.data.sources import BUILTIN, SELF
from hfprune.data.stream import ExampleStream, StreamLoader, StreamSource
from hfprune.evaluation.overlap import Sketch, warn_of_share
from hfprune.evaluation.perplexity import Windows
from hfprune.io.demo_model import cache_dir
from hfprune.io.load import check_tokenizer, predicts_badly_without_bos
from hfprune.models.forward import check_packing
from hfprune.objectives.base import IGNORE_INDEX
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import user_path
from hfprune.utils.flat_options import flat_options

SEEN: tuple[Role, ...] = ("calibration", "recovery")
"""Roles whose text the evaluated model has seen."""


def summarise(role: Role, value: Tensor | Windows | list[Example], builder: Builder) -> dict[str, Any]:
    """Returns the provenance of a role: source, kind, counts, SHA-256 of the token ids, and an n-gram sketch."""
    ids = token_ids(value)
    labels = [label for _, labels in value for label in labels] if isinstance(value, list) else []
    summary = {
        "source": builder.sources[role],
        "kind": builder.kind(role),
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "supervised_tokens": sum(label != IGNORE_INDEX for label in labels) or None,
        "dropped": builder.dropped_counts(role),
        "bos": builder.bos_lines.get(role),
        "sha256": _digest(ids),
    }
    if builder.sources[role] == SELF:
        summary["self_text"] = asdict(builder.writer.settings) if builder.writer else None
    return summary | ({"ngrams": Sketch.of(ids).to_text()} if role in SEEN else {})


def summarise_stream(stream: ExampleStream, builder: Builder) -> dict[str, Any]:
    """Returns the provenance of a stream: source, order and dropped rows so far, without token counts."""
    return {
        "source": stream.source.source,
        "kind": "stream",
        "shuffle_buffer": stream.shuffle_buffer,
        "seed": stream.seed,
        "dropped": dict(stream.counts),
        "bos": builder.bos_line(stream.kind),
    }


def overlap(summary: Mapping[str, Any], windows: Windows | None) -> dict[str, float]:
    """Returns role -> share of the evaluation text's 13-grams in its text, for calibration and recovery."""
    if windows is None:
        return {}
    asked = token_ids(windows)
    known: dict[str, str] = {role: summary[role]["ngrams"] for role in SEEN if "ngrams" in summary.get(role, {})}
    return {role: Sketch.from_text(sketch).share_of(asked) for role, sketch in known.items()}


def warn_of_overlap(shares: Mapping[str, float]) -> None:
    """Warns if the evaluation text overlaps with the calibration or recovery text."""
    for role, share in shares.items():
        warn_of_share(share, f"the {role} text")


def token_ids(value: Tensor | Windows | list[Example]) -> list[list[int]]:
    """Returns the token ids of a role's sequences, examples or windows."""
    if isinstance(value, list):
        return [ids for ids, _ in value]
    rows: list[list[int]] = (value.ids if isinstance(value, Windows) else value).tolist()
    return rows


def _digest(sequences: list[list[int]]) -> str:
    """Returns a digest of the sequences and their boundaries."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


class TextDataModule(ResumableDataModule):
    """Datamodule with disjoint calibration, recovery, validation and evaluation data.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> data = TextDataModule("builtin", seq_len=64, calibration_sequences=8, eval_windows=2)
    >>> data.bind(PreTrainedTokenizerFast(tokenizer_object=words), vocab_size=2, max_positions=512)
    >>> next(iter(data.calibration_dataloader()))["input_ids"].shape
    torch.Size([1, 64])
    >>> data.evaluation_windows().ids.shape
    torch.Size([2, 512])

    In ``fit``, the datamodule uses the tokenizer of the trainer's module.

    A source is a ``.txt``, JSON, ``.csv``, ``.tsv``, ``.parquet`` or ``.safetensors`` file (``input_ids``), compressed
    or not, a folder or glob of such files, a folder of ``save_to_disk``, a hub data set id, ``builtin`` (English text
    of Python's documentation), or ``self`` (text generated by the dense model). Roles with the same source get disjoint
    documents, and a document in two sources is used for one role.

    Options of the five groups can be given as single keywords as well, which are the flags of the command line:
    ``TextDataModule("builtin", seq_len=64)`` equals ``TextDataModule("builtin", tokens=TokenOptions(seq_len=64))``.

    Args:
        calibration: Source of the calibration sequences.
        recovery: Source of the training data; other documents of the calibration source if not given.
        validation: Source of the validation loss; held-out documents of the recovery source if not given.
        text: Evaluation text for perplexity and fidelity; held-out documents of the calibration source if not given.
        reading: Column, split, and generation of text.
        tokens: Length of sequences, BOS, templates and packing.
        samples: Number of sequences per role, and the seed.
        batches: Batch sizes, worker processes and streaming.
        windows: Number, length and stride of evaluation windows.

    Raises:
        ConfigError: A value is out of range, or a source cannot be used.
    """

    @flat_options(
        reading=ReadingOptions,
        tokens=TokenOptions,
        samples=SampleOptions,
        batches=BatchOptions,
        windows=WindowOptions,
    )
    def __init__(
        self,
        calibration: str = BUILTIN,
        *,
        recovery: str | None = None,
        validation: str | None = None,
        text: str | None = None,
        reading: ReadingOptions | None = None,
        tokens: TokenOptions | None = None,
        samples: SampleOptions | None = None,
        batches: BatchOptions | None = None,
        windows: WindowOptions | None = None,
    ) -> None:
        super().__init__()
        reading, tokens, samples = reading or ReadingOptions(), tokens or TokenOptions(), samples or SampleOptions()
        batches, windows = batches or BatchOptions(), windows or WindowOptions()
        self.seq_len, self.bos, self.seed = tokens.seq_len, tokens.bos, samples.seed
        self.calibration_sequences, self.calibration_layout = samples.calibration_sequences, samples.calibration_layout
        self.recovery_sequences, self.validation_sequences = samples.recovery_sequences, samples.validation_sequences
        self.calibration_batch_size, self.batch_size = batches.calibration_batch_size, batches.batch_size
        self.num_workers, self.streaming, self.shuffle_buffer = (
            batches.num_workers,
            batches.streaming,
            batches.shuffle_buffer,
        )
        self.eval_windows, self.eval_window, self.eval_stride = (
            windows.eval_windows,
            windows.eval_window,
            windows.eval_stride,
        )
        self.self_text = reading.self_text
        self._eval_bos = windows_bos(tokens.bos, windows.eval_bos)
        given_template, given_cache = tokens.chat_template, tokens.token_cache
        self.chat_template = None if given_template is None else user_path(given_template, "chat_template")
        self.token_cache = None if given_cache is None else user_path(given_cache, "token_cache")
        check_values(self)
        self.options = ExampleOptions(
            seq_len=tokens.seq_len,
            template=tokens.template,
            overlong=tokens.overlong,
            packing=tokens.packing,
            bos=tokens.bos,
        )
        self._set_sources(
            {"calibration": calibration, "recovery": recovery, "validation": validation, "evaluation": text}, reading
        )
        self._builder: Builder | None = None
        self._cache: dict[Role, Any] = {}
        self._summaries: dict[Role, dict[str, Any]] = {}

    def _set_sources(self, given: dict[Role, str | None], reading: ReadingOptions) -> None:
        """Sets the source of every role, and the documents that are split over roles.

        Args:
            given: Role -> source, None for the default.
            reading: How sources are read.
        """
        check_sources(given)
        self._sources = fill_in(given, streaming=self.streaming)
        if self.eval_windows == 0:
            self._sources.pop("evaluation", None)
        self._explicit_text = given["evaluation"] is not None
        read: dict[str, Any] = {"split": reading.split, "text_field": reading.text_field}
        self._stream = StreamSource(source=self._sources.get("recovery", ""), **read)
        if self.streaming:
            self._stream.check()
        streamed = {"recovery"} if self.streaming else set()
        loaded = {role: s for role, s in self._sources.items() if s != SELF and role not in streamed}
        self._roles = Roles(loaded, **read, seed=self.seed)

    def local_sources(self) -> dict[str, Path]:
        """Returns the local files and folders of the sources, by argument."""
        given = {"text" if role == "evaluation" else role: source for role, source in self._sources.items()}
        return {f"data.{name}": Path(source) for name, source in given.items() if os.path.exists(source)}

    def bind(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_positions: int | None,
        author: Author | None = None,
        needs_bos: bool = False,
    ) -> None:
        """Sets the tokenizer and the limits of the model; called by ``setup`` for the trainer's module.

        Args:
            tokenizer: The model's tokenizer.
            vocab_size: Number of token embeddings of the model.
            max_positions: Maximum sequence length of the model, or None.
            author: Model that generates text for the source ``self``.
            needs_bos: Whether the model requires BOS; sequences without it give a warning.

        Raises:
            ConfigError: The tokenizer has ids outside the model's vocabulary, or lacks a required BOS token.
        """
        check_tokenizer(tokenizer, vocab_size)
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template)
        for setting in (self.bos, self._eval_bos):
            bos_id(tokenizer, setting)  # says that there is none before anything is read
        folder = cache_dir() / "written"
        self._builder = Builder(
            roles=self._roles,
            sources=self._sources,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            max_positions=max_positions,
            seed=self.seed,
            options=self.options,
            token_cache=self.token_cache,
            needs_bos=needs_bos,
            writer=None if author is None else Writer(author, tokenizer, self.self_text, seed=self.seed, folder=folder),
        )

    def serve(self, *, training: bool) -> None:
        """Declares whether recovery and validation are used; otherwise calibration also gets their documents."""
        if self._roles.lend(() if training else ("recovery", "validation")):
            for role in ("calibration", "recovery", "validation"):
                self._cache.pop(role, None)
                self._summaries.pop(role, None)

    def _bind_trainer(self) -> None:
        assert self.trainer is not None
        if self._builder is None:
            module: Any = self.trainer.lightning_module
            needed = SELF in self._sources.values()
            author = author_of(module, device=self.trainer.strategy.root_device) if needed else None
            limits = {"vocab_size": module.vocab_size, "max_positions": module.max_positions}
            self.bind(module.tokenizer, **limits, author=author, needs_bos=predicts_badly_without_bos(module.config))
            if self.options.packing:
                check_packing(module.meta_model())

    def prepare_data(self) -> None:
        """Generates text in one process per machine; the other processes read its file."""
        if SELF in self._sources.values() and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._bind_trainer()
            self._build_for_fit()

    def setup(self, stage: str) -> None:
        """Builds the data of the run before a model is loaded."""
        assert self.trainer is not None
        self._bind_trainer()
        if stage == "fit":
            self.serve(training=bool(self.trainer.limit_train_batches or self.trainer.limit_val_batches))
            if self.streaming and self.trainer.limit_train_batches:
                check_stream(self, self.trainer)
            self._build_for_fit()
            warn_of_overlap(self.overlap())

    def _build_for_fit(self) -> None:
        assert self.trainer is not None
        if self.trainer.limit_train_batches and self._sources.get("recovery") == SELF and not self.streaming:
            self._build.check_count("recovery", self.recovery_sequences)  # before calibration text is written
        self.calibration_dataloader()
        self.evaluation_windows()
        if self.trainer.limit_train_batches:
            self.train_dataloader()
        if self.trainer.limit_val_batches:
            self.val_dataloader()

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Returns calibration batches of ``input_ids`` and ``attention_mask`` [B, T], in a fixed order."""
        ids = self._once("calibration", self._calibration_ids)
        rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        return DataLoader(rows, batch_size=self.calibration_batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns shuffled recovery batches of ``input_ids``, ``attention_mask`` and ``labels`` [B, T]."""
        trainer = self.trainer
        ranks = {
            "num_replicas": trainer.world_size if trainer else 1,
            "rank": trainer.global_rank if trainer else 0,
        }
        if self.streaming:
            return self._resumed(self._loaders.stream(self._stream, shuffle_buffer=self.shuffle_buffer, **ranks))
        examples = self._once("recovery", lambda: self._build.examples("recovery", self.recovery_sequences))
        return self._resumed(self._loaders.training(examples, **ranks))

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation batches."""
        examples = self._once("validation", lambda: self._build.examples("validation", self.validation_sequences))
        return self._loaders.validation(examples)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the evaluation windows in batches of ``input_ids`` and ``attention_mask`` [B, T].

        Raises:
            ConfigError: There is no evaluation text.
        """
        windows = self.evaluation_windows()
        if windows is None:
            raise ConfigError("There is no evaluation text: set text, and eval_windows above 0.")
        rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows.ids]
        return DataLoader(rows, batch_size=self.batch_size)

    predict_dataloader = test_dataloader

    def evaluation_windows(self) -> Windows | None:
        """Returns the evaluation windows and their protocol, or None without an evaluation text.

        The text is tokenised as a whole, without special tokens. BOS is then added to each window according to ``bos``.
        """
        windows: Windows | None = self._once(
            "evaluation",
            lambda: self._build.windows(
                window=self.eval_window,
                stride=self.eval_stride,
                count=self.eval_windows,
                bos=self._eval_bos,
                explicit=self._explicit_text,
            ),
        )
        return windows

    def overlap(self) -> dict[str, float]:
        """Returns the share of the evaluation text's 13-grams in the calibration and recovery data built so far.

        Documents of the roles are disjoint, but texts from different sources may quote each other.
        """
        return overlap(self.summary(), self.evaluation_windows())

    def summary(self) -> dict[str, Any]:
        """Returns the provenance of every role used so far: source, token counts and SHA-256."""
        for role, value in self._cache.items():
            if value is not None and role not in self._summaries:
                self._summaries[role] = summarise(role, value, self._build)
        summaries: dict[str, Any] = {str(role): summary for role, summary in self._summaries.items()}
        if isinstance(self._loader, StreamLoader):
            summaries["recovery"] = summarise_stream(self._loader.stream, self._build)
        return summaries

    # ---- building ----------------------------------------------------------------------------------------------------

    def _once(self, role: Role, build: Callable[[], Any]) -> Any:
        if role not in self._cache:
            self._cache[role] = build()
        return self._cache[role]

    @property
    def _loaders(self) -> Loaders:
        sizes = {"batch_size": self.batch_size, "seed": self.seed, "num_workers": self.num_workers}
        return Loaders(build=self._build, **sizes)

    @property
    def _build(self) -> Builder:
        if self._builder is None:
            raise ConfigError("The data do not know the model's tokenizer yet: call bind() or setup() first.")
        return self._builder

    def _calibration_ids(self) -> Tensor:
        crop, asked = self.calibration_layout == "crop", self.calibration_sequences
        return self._build.calibration(asked, crop=crop)
