"""``TextDataModule``: every token that a run sees, with its provenance."""

import warnings
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from hfprune.data.build import Builder, Example
from hfprune.data.encode import pad
from hfprune.data.roles import Role, Roles
from hfprune.data.sampler import ResumableLoader
from hfprune.data.sources import BUILTIN, check_source
from hfprune.data.summary import SEEN, summarise, token_ids
from hfprune.errors import ConfigError
from hfprune.evaluation.overlap import SUSPICIOUS, Sketch
from hfprune.evaluation.windows import Windows
from hfprune.objectives.base import IGNORE_INDEX


class TextDataModule(LightningDataModule):
    """Calibration, recovery, validation and evaluation data that never overlap.

    A source is a ``.txt``, ``.json``, ``.jsonl`` (also ``.gz``), ``.parquet`` or ``.safetensors`` file (``input_ids``),
    a folder of ``save_to_disk``, a hub data set id, or ``builtin``: the English text of Python's documentation. Roles
    that share a source get disjoint documents; a document that occurs in two sources stays with one role.

    Args:
        calibration: Source of the calibration sequences.
        recovery: Source of the training data; the calibration source's other documents if not given.
        validation: Source of the validation loss; held-out documents of the recovery source if not given.
        text: Evaluation text for perplexity and fidelity; held-out documents of the calibration source if not given.
        text_field: Column that holds the text; ``text`` or ``content`` if not given.
        split: Split of hub data sets.
        seq_len: Tokens per sequence.
        calibration_sequences: Number of calibration sequences.
        calibration_layout: ``concat``: documents joined with EOS and cut; ``crop``: a crop of each long document.
        calibration_batch_size: Sequences per calibration step; scores do not depend on it.
        batch_size: Sequences per recovery step and device.
        recovery_sequences: Use at most this many training sequences.
        validation_sequences: Use at most this many validation sequences.
        eval_windows: Evaluation windows: the first so many, all of them if null, none if 0.
        eval_window: Tokens per evaluation window.
        eval_stride: Tokens from one evaluation window to the next; windows do not overlap if not given. With a smaller
            stride, each scores its last ``eval_stride`` tokens only, with the rest as context.
        eval_bos: Begin every evaluation window with the BOS token.
        seed: Seed of document assignment, crops and shuffling; 0 is a seed.
        num_workers: Worker processes of the training loader.
    """

    def __init__(
        self,
        calibration: str = BUILTIN,
        *,
        recovery: str | None = None,
        validation: str | None = None,
        text: str | None = None,
        text_field: str | None = None,
        split: str = "train",
        seq_len: int = 512,
        calibration_sequences: int = 128,
        calibration_layout: Literal["concat", "crop"] = "concat",
        calibration_batch_size: int = 1,
        batch_size: int = 8,
        recovery_sequences: int | None = None,
        validation_sequences: int = 16,
        eval_windows: int | None = 40,
        eval_window: int = 512,
        eval_stride: int | None = None,
        eval_bos: bool = False,
        seed: int = 42,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.seq_len, self.calibration_sequences = seq_len, calibration_sequences
        self.calibration_layout, self.calibration_batch_size = calibration_layout, calibration_batch_size
        self.batch_size, self.recovery_sequences, self.validation_sequences = (
            batch_size,
            recovery_sequences,
            validation_sequences,
        )
        self.eval_windows, self.eval_window, self.seed, self.num_workers = eval_windows, eval_window, seed, num_workers
        self.eval_stride, self.eval_bos = eval_stride, eval_bos
        self._check_values()
        given = {"calibration": calibration, "recovery": recovery, "validation": validation, "evaluation": text}
        for role, source in given.items():
            if source is not None:
                check_source(source, "--data.text" if role == "evaluation" else f"--data.{role}")
        self._sources = _fill_in(calibration, recovery, validation, text)
        if eval_windows == 0:
            self._sources.pop("evaluation", None)
        self._explicit_text = text is not None
        self._roles = Roles(self._sources, split=split, text_field=text_field, seed=seed)
        self._builder: Builder | None = None
        self._cache: dict[Role, Any] = {}
        self._summaries: dict[Role, dict[str, Any]] = {}
        self._loader: ResumableLoader | None = None
        self._position: dict[str, int] | None = None

    def _check_values(self) -> None:
        names = ("calibration_sequences", "calibration_batch_size", "batch_size", "validation_sequences")
        for name in (*names, "recovery_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--data.{name} {value} is not positive.")
        for name in ("seq_len", "eval_window"):
            if getattr(self, name) < 2:
                raise ConfigError(f"--data.{name} {getattr(self, name)} is less than 2 tokens.")
        if self.eval_windows is not None and self.eval_windows < 0:
            raise ConfigError(f"--data.eval_windows {self.eval_windows} is negative.")
        longest = self.eval_window - self.eval_bos
        if self.eval_stride is not None and not 1 <= self.eval_stride <= longest:
            raise ConfigError(f"--data.eval_stride {self.eval_stride} is not between 1 and {longest}, a window's text.")
        if self.num_workers < 0:
            raise ConfigError(f"--data.num_workers {self.num_workers} is negative; 0 loads in the main process.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--data.seed {self.seed} is not between 0 and {2**32 - 1}.")
        if self.calibration_layout not in ("concat", "crop"):
            raise ConfigError(f"--data.calibration_layout '{self.calibration_layout}' is neither concat nor crop.")

    def bind(self, tokenizer: Any, *, vocab_size: int, max_positions: int | None) -> None:
        """Tells the data whose tokenizer to use and what the model allows; ``setup`` does it from the trainer's module.

        Raises:
            ConfigError: The tokenizer has ids that the model does not know.
        """
        if len(tokenizer) > vocab_size:
            raise ConfigError(
                f"The tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embeddings: they do not "
                "belong together."
            )
        self._builder = Builder(
            roles=self._roles,
            sources=self._sources,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            max_positions=max_positions,
            seq_len=self.seq_len,
            seed=self.seed,
        )

    def setup(self, stage: str) -> None:
        """Builds what the run will need, so that unusable data is said before a model is loaded."""
        assert self.trainer is not None
        if self._builder is None:
            module: Any = self.trainer.lightning_module
            self.bind(module.tokenizer, vocab_size=module.vocab_size, max_positions=module.max_positions)
        if stage == "fit":
            self.calibration_dataloader()
            self.evaluation_windows()
            if self.trainer.limit_train_batches:
                self.train_dataloader()
            if self.trainer.limit_val_batches:
                self.val_dataloader()
            self._warn_of_overlap()

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Returns batches of ``input_ids`` and ``attention_mask`` [B, T], in a fixed order."""
        ids = self._once("calibration", self._calibration_ids)
        rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        return DataLoader(rows, batch_size=self.calibration_batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the recovery batches, shuffled by the seed: ``input_ids``, ``attention_mask``, ``labels`` [B, T]."""
        examples = self._once("recovery", lambda: self._build.examples("recovery", self.recovery_sequences))
        trainer = self.trainer
        self._loader = ResumableLoader.over(
            examples,
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )
        if self._position is not None:
            self._loader.load_state_dict(self._position)
            self._position = None
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training data.

        Lightning restores a loader's own position only when nothing has asked for the number of training steps before,
        as schedulers do.
        """
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues in the training data where the checkpoint left it."""
        self._position = state_dict.get("train")
        if self._loader is not None and self._position is not None:
            self._loader.load_state_dict(self._position)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation batches."""
        examples = self._once("validation", lambda: self._build.examples("validation", self.validation_sequences))
        return DataLoader(examples, batch_size=self.batch_size, collate_fn=self._collate, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the evaluation windows in batches of ``input_ids`` and ``attention_mask``; also for ``predict``.

        Raises:
            ConfigError: There is no evaluation text.
        """
        windows = self.evaluation_windows()
        if windows is None:
            raise ConfigError("There is no evaluation text: give --data.text and --data.eval_windows above 0.")
        rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows.ids]
        return DataLoader(rows, batch_size=self.batch_size)

    predict_dataloader = test_dataloader

    def evaluation_windows(self) -> Windows | None:
        """Returns the evaluation windows and their protocol, None when there is no evaluation text.

        The text is tokenised once, as a whole, without special tokens.
        """
        windows: Windows | None = self._once(
            "evaluation",
            lambda: self._build.windows(
                window=self.eval_window,
                stride=self.eval_stride,
                count=self.eval_windows,
                bos=self.eval_bos,
                explicit=self._explicit_text,
            ),
        )
        return windows

    def overlap(self) -> dict[str, float]:
        """Returns, for calibration and recovery data built so far, the share of the evaluation text's 13-grams in it.

        Documents are never shared, but texts from different sources may quote each other.
        """
        windows = self.evaluation_windows()
        if windows is None:
            return {}
        summary, asked = self.summary(), token_ids(windows)
        return {r: Sketch.from_text(summary[r]["ngrams"]).share_of(asked) for r in SEEN if r in summary}

    def _warn_of_overlap(self) -> None:
        for role, share in self.overlap().items():
            if share >= SUSPICIOUS:
                warnings.warn(
                    f"{share:.0%} of the evaluation text's 13-grams occur in the {role} text: its figures will look "
                    "better than they are. Give another --data.text.",
                    stacklevel=2,
                )

    def summary(self) -> dict[str, Any]:
        """Returns, for every role used so far, where its tokens came from, how many, and their SHA-256."""
        for role, value in self._cache.items():
            if value is not None and role not in self._summaries:
                self._summaries[role] = summarise(role, value, self._build)
        return {str(role): found for role, found in self._summaries.items()}

    # ---- building ----------------------------------------------------------------------------------------------------

    def _once(self, role: Role, build: Any) -> Any:
        if role not in self._cache:
            self._cache[role] = build()
        return self._cache[role]

    @property
    def _build(self) -> Builder:
        if self._builder is None:
            raise ConfigError("The data do not know the model's tokenizer yet: call bind() or setup() first.")
        return self._builder

    def _calibration_ids(self) -> Tensor:
        ids = self._build.sequences("calibration", self.calibration_sequences, crop=self.calibration_layout == "crop")
        if len(ids) < self.calibration_sequences:
            source, asked = self._sources["calibration"], self.calibration_sequences
            warnings.warn(f"--data.calibration '{source}' gives {len(ids)} sequences, not {asked}.", stacklevel=2)
        return ids

    def _collate(self, examples: list[Example]) -> dict[str, Tensor]:
        filler = self._build.tokenizer.pad_token_id
        ids = pad([e[0] for e in examples], self._build.tokenizer.eos_token_id or 0 if filler is None else filler)
        labels = pad([e[1] for e in examples], IGNORE_INDEX)
        mask = pad([[1] * len(e[0]) for e in examples], 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _fill_in(calibration: str, recovery: str | None, validation: str | None, text: str | None) -> dict[Role, str]:
    """Returns role -> source; a role that was not given borrows from the calibration or recovery source.

    Pre-tokenised calibration data is used for calibration alone, all of it.
    """
    lender = None if calibration.endswith(".safetensors") else calibration
    recovery = recovery or lender
    given: dict[Role, str | None] = {
        "calibration": calibration,
        "recovery": recovery,
        "validation": validation or recovery,
        "evaluation": text or lender,
    }
    return {role: source for role, source in given.items() if source is not None}
