"""From text to token ids. No special tokens are added inside sequences; documents end with EOS where it exists."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.data.layouts import InstructionRow
from hfprune.errors import ConfigError

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_BATCH = 64


def encode(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yields the token ids of each text, without special tokens, a batch of texts at a time."""
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def concat_blocks(texts: Iterable[str], tokenizer: Any, *, seq_len: int, max_blocks: int | None) -> Tensor:
    """Returns the documents, joined with EOS, cut into full blocks: [N, seq_len] int64; stops once N is reached."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stream: list[int] = []
    for ids in encode(texts, tokenizer):
        stream += ids + end
        if max_blocks is not None and len(stream) >= max_blocks * seq_len:
            break
    blocks = len(stream) // seq_len if max_blocks is None else min(len(stream) // seq_len, max_blocks)
    if not blocks:
        raise ConfigError(f"the text gives {len(stream)} tokens, fewer than one sequence of {seq_len}")
    return torch.tensor(stream[: blocks * seq_len]).view(blocks, seq_len)


def crop_documents(
    texts: Iterable[str], tokenizer: Any, *, seq_len: int, max_sequences: int | None, seed: int
) -> Tensor:
    """Returns a seeded random crop of each document that is long enough: [N, seq_len] int64 (HFPrune's calibration)."""
    generator = random.Random(seed)
    crops: list[list[int]] = []
    seen = longest = 0
    for ids in encode(texts, tokenizer):
        seen, longest = seen + 1, max(longest, len(ids))
        if len(ids) >= seq_len:
            start = generator.randrange(len(ids) - seq_len + 1)
            crops.append(ids[start : start + seq_len])
        if max_sequences is not None and len(crops) >= max_sequences:
            break
    if not crops:
        raise ConfigError(
            f"none of the {seen} documents has {seq_len} tokens (the longest has {longest}); use "
            "--data.calibration_layout concat or a smaller --data.seq_len"
        )
    return torch.tensor(crops)


def prompt_of(row: InstructionRow) -> str:
    """Returns the Alpaca prompt of an example, up to and including the response header."""
    template = PROMPT_WITH_INPUT if row.input.strip() else PROMPT
    return template.format(instruction=row.instruction, input=row.input)


def tokenizer_key(tokenizer: Any) -> str:
    """Returns the digest of all that a tokenizer's ids depend on: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}  # states of use
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    template = getattr(tokenizer, "chat_template", None)
    text = json.dumps([type(tokenizer).__name__, len(tokenizer), rules, special, template], default=str, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_template(path: str) -> str:
    """Returns the text of a chat template's file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data.chat_template '{path}' cannot be read: {error}.") from error


def check_vocabulary(ids: Tensor, *, vocab_size: int, source: str) -> None:
    """Raises ``ConfigError`` when ``ids`` holds an id that the model has no embedding for."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"'{source}' holds token id {low if low < 0 else high}, the model knows ids 0 to {vocab_size - 1}: the "
            "tokens are those of another tokenizer."
        )


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Returns the sequences as [B, T], padded on the right with ``value``."""
    longest = max(len(s) for s in sequences)
    return torch.tensor([[*s, *[value] * (longest - len(s))] for s in sequences])
