"""Self-generated text: samples of the dense model, for calibration and recovery without data.

Each sequence has a separate random generator, seeded by seed, role and number, and is sampled in float64. Matrix
products of different sizes may round differently, and one different token changes everything after it. The batch size
is therefore part of the cache key.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.data.encode import encode, tokenizer_key
from hfprune.data.examples import digest
from hfprune.io.load import load_causal_lm, model_files
from hfprune.io.loading import LoadingOptions
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import load_tensors, write_tensors
from hfprune.utils.progress import phase
from hfprune.utils.random_numbers import inverse_cdf, isolated_rng

_log = logging.getLogger("hfprune")
_FORMAT = 2
"""Version of the sampling; text of other versions is not reused."""
_SAMPLES = 1024
"""Number of positions of each weight file that identify a model."""


@dataclass(frozen=True, kw_only=True)  # without slots: the command line reads a default's __dict__
class SelfText:
    """Settings of self-generated text.

    Attributes:
        temperature: Sampling temperature.
        top_p: Total probability of the most likely tokens to sample from; 1 samples from all tokens.
        batch_size: Number of sequences generated at a time.
        start: Text at the start of every sequence; the BOS token, or EOS without BOS, if not given.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16
    start: str | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} must be positive.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1].")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be positive.")


OWN_WORDS = SelfText()
"""Sampling from the model's distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Model that generates text.

    Attributes:
        load: Returns the model on its device; only called if text is to be generated.
        key: Returns a digest that identifies the model.
    """

    load: Callable[[], Any]
    key: Callable[[], str]


def author_of(module: Any, *, device: torch.device) -> Author:
    """Returns a separately loaded dense model of a ``PruningModule`` as an author.

    Args:
        module: Module with ``path`` and ``loading``.
        device: Device of the model.
    """

    def load() -> Any:
        with isolated_rng():
            return load_causal_lm(module.path, loading=module.loading).to(device)

    def key() -> str:
        return digest(files_key(module.path, loading=module.loading), module.dtype_name)

    return Author(load=load, key=key)


class Writer:
    """Generates sequences and caches them in a folder; an interrupted generation continues.

    Args:
        author: The model.
        tokenizer: Its tokenizer.
        settings: Settings of the generation.
        seed: Seed of the sampling.
        folder: Folder of the cache.
    """

    def __init__(self, author: Author, tokenizer: Any, settings: SelfText, *, seed: int, folder: Path) -> None:
        self._author, self._tokenizer, self.settings, self._seed = author, tokenizer, settings, seed
        self._folder = folder

    def rows(self, role: str, count: int, length: int) -> Tensor:
        """Returns the first ``count`` sequences of a role, [count, length] int64, including the start."""
        text = [_FORMAT, asdict(self.settings), self._seed, role, length, count]
        key = digest(self._author.key(), tokenizer_key(self._tokenizer), text)
        path = self._folder / f"{key[:32]}.safetensors"
        tensors = load_tensors(path, key=key)
        if tensors is None:
            tensors = {"input_ids": self._write(role, count, length, path.with_suffix(".unfinished"), key)}
            write_tensors(path, tensors, {"key": key, "tokenizer": tokenizer_key(self._tokenizer)})
            path.with_suffix(".unfinished").unlink(missing_ok=True)
        return tensors["input_ids"]

    def _write(self, role: str, count: int, length: int, unfinished: Path, key: str) -> Tensor:
        start = self._start(length)
        kept = load_tensors(unfinished, key=key)
        rows = torch.empty(0, length, dtype=torch.int64) if kept is None else kept["input_ids"]
        model = self._author.load().eval()
        _log.info("The model writes %d sequences of %d tokens (%s).", count, length, role)
        with phase("writing text with the model", total=count, unit="sequence") as current:
            while len(rows) < count:
                numbers = range(len(rows), min(len(rows) + self.settings.batch_size, count))
                seeds = [_seed_of(self._seed, role, number) for number in numbers]
                known = len(self._tokenizer)
                rows = torch.cat([rows, write(model, start, seeds, length, known=known, settings=self.settings)])
                write_tensors(unfinished, {"input_ids": rows}, {"key": key})
                current.update(len(rows))
        return rows

    def _start(self, length: int) -> list[int]:
        if self.settings.start is not None:
            (ids,) = encode([self.settings.start], self._tokenizer)
        else:
            tokenizer = self._tokenizer
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = [] if first is None else [int(first)]
        if not 0 < len(ids) < length:
            raise ConfigError(
                f"start has {len(ids)} tokens (BOS or EOS if not given); at least one is required, and fewer than "
                f"seq_len={length}."
            )
        return ids


@torch.no_grad()
def write(
    model: Any, start: list[int], seeds: list[int], length: int, *, known: int | None = None, settings: SelfText
) -> Tensor:
    """Returns one sequence per seed, [len(seeds), length] int64, on the CPU.

    Generation continues after EOS, as documents follow each other in concatenated text.

    Args:
        model: A Hugging Face causal LM in eval mode.
        start: Token ids at the start of every sequence, at least one.
        seeds: Seed of each sequence.
        length: Number of tokens per sequence.
        known: Number of token ids to sample from; further embeddings belong to no token.
        settings: Temperature and top-p.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ids = torch.tensor([start] * len(seeds))
    fed, cache = ids, None
    while ids.shape[1] < length:
        output = model(input_ids=fed.to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, :known].to("cpu", torch.float64)
        fed = draw(logits, generators, settings)[:, None]
        ids = torch.cat([ids, fed], dim=1)
    return ids


def draw(logits: Tensor, generators: list[torch.Generator], settings: SelfText) -> Tensor:
    """Returns one token per row, [N] int64, sampled from the softmax of ``logits`` with one uniform number each.

    Args:
        logits: [N, V], float64, on the CPU.
        generators: One generator per row.
        settings: Temperature and top-p.
    """
    p = (logits / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        ranked, order = p.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= settings.top_p
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
    numbers = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return inverse_cdf(p, numbers)


def _seed_of(seed: int, role: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {role} {number}".encode()).digest()[:4], "little")


def files_key(path: str, *, loading: LoadingOptions | None = None) -> str:
    """Returns a digest of a saved model: its config, and names, sizes and sampled bytes of its weight files.

    Up to 1,024 pieces of 64 bytes at equal distances are read from each file.

    Args:
        path: A folder, a hub id, or the name of the embedded model.
        loading: Revision, subfolder, token and others; the defaults if not given.
    """
    parts: list[Any] = []
    for file in model_files(path, loading=loading):
        size, sha256 = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as opened:
            for place in range(0, size, max(64, size // _SAMPLES)):
                opened.seek(place)
                sha256.update(opened.read(64))
        parts.append([file.name, size, sha256.hexdigest()])
    return digest(parts)
