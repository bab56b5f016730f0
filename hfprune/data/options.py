"""Options of TextDataModule: reading, tokens, samples, batches and evaluation windows.

The fields are the flags of the command line (``--data.seq_len``) and the keys of config files, where they are flat.
"""

from dataclasses import dataclass
from typing import Literal

from hfprune.data.encode import BosSetting
from hfprune.data.self_generated import OWN_WORDS, SelfText


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How sources are read.

    Attributes:
        text_field: Column of the text; ``text`` or ``content`` if not given.
        split: Split of hub data sets.
        self_text: Settings of text generated for the source ``self``.
    """

    text_field: str | None = None
    split: str = "train"
    self_text: SelfText = OWN_WORDS


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How text becomes sequences of tokens.

    Attributes:
        seq_len: Number of tokens per sequence.
        bos: BOS at the start of documents, sequences and evaluation windows: ``auto`` (as the tokenizer adds it),
            ``always`` or ``never``. With ``calibration_layout`` ``crop``, only crops from the start of a document have
            BOS, as published, unless ``always``. Conversations have the BOS of their chat template; ``always`` adds a
            missing one.
        template: Template of instructions: ``alpaca``, or ``chat`` for the tokenizer's chat template, which
            conversations always use.
        chat_template: Jinja file of a chat template that replaces the tokenizer's and is exported with the model.
        overlong: Treatment of examples longer than ``seq_len``: ``split``, ``cut`` with EOS as the last token, or
            ``drop``.
        packing: Whether rows of ``seq_len`` tokens hold several examples, which do not attend to each other.
        token_cache: Folder for tokenised examples.
    """

    seq_len: int = 512
    bos: BosSetting = "auto"
    template: Literal["alpaca", "chat"] = "alpaca"
    chat_template: str | None = None
    overlong: Literal["split", "cut", "drop"] = "split"
    packing: bool = False
    token_cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How many sequences each role has, and how calibration sequences are taken from documents.

    Attributes:
        calibration_sequences: Number of calibration sequences.
        calibration_layout: ``concat``: documents joined with EOS and cut; ``crop``: a crop of each long document.
        recovery_sequences: Maximum number of training sequences (examples, with ``packing``).
        validation_sequences: Maximum number of validation sequences.
        seed: Seed of document assignment, crops and shuffling.
    """

    calibration_sequences: int = 128
    calibration_layout: Literal["concat", "crop"] = "concat"
    recovery_sequences: int | None = None
    validation_sequences: int = 16
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How sequences are put into batches.

    Attributes:
        calibration_batch_size: Number of sequences per calibration step, which does not change scores.
        batch_size: Number of sequences per recovery step and device.
        num_workers: Number of worker processes of the training loader.
        streaming: Whether to read the recovery source row by row, for data larger than memory.
        shuffle_buffer: Number of rows shuffled together when streaming.
    """

    calibration_batch_size: int = 1
    batch_size: int = 8
    num_workers: int = 0
    streaming: bool = False
    shuffle_buffer: int = 4096


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Evaluation windows.

    Attributes:
        eval_windows: Maximum number of evaluation windows, the first ones; None for all, 0 for none.
        eval_window: Number of tokens per evaluation window.
        eval_stride: Number of tokens between the starts of windows; windows do not overlap if not given. With a smaller
            stride, only the last ``eval_stride`` tokens of a window are scored, with the others as context.
        eval_bos: Deprecated name of ``bos`` for evaluation windows only; will be removed in the next release.
    """

    eval_windows: int | None = 40
    eval_window: int = 512
    eval_stride: int | None = None
    eval_bos: bool | None = None
