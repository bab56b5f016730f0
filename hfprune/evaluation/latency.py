"""Prefill and decode speed at batch 1."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune.errors import ConfigError
from hfprune.evaluation.hidden import inference
from hfprune.loading import max_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Medians over repeats, after a warm-up.

    Attributes:
        prefill_ms: One forward pass over the prompt, milliseconds.
        prefill_spread_ms: Fastest and slowest repeat.
        decode_ms: Greedy decoding with a cache, milliseconds per token.
        decode_spread_ms: Fastest and slowest repeat.
        device: Device type.
        dtype: Type of the weights.
        threads: CPU threads of the process.
        prompt_tokens: Length of the prompt.
        new_tokens: Decoded tokens.
        repeats: Number of repeats.
    """

    prefill_ms: float
    prefill_spread_ms: tuple[float, float]
    decode_ms: float
    decode_spread_ms: tuple[float, float]
    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoded tokens per second."""
        return 1000 / self.decode_ms

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, for reports."""
        return asdict(self) | {"decode_tokens_per_s": self.decode_tokens_per_s}


def measure_latency(
    model: Any, *, prompt_tokens: int = 256, new_tokens: int = 16, repeats: int = 5, warmup: int = 1, seed: int = 0
) -> Latency:
    """Returns how fast ``model`` reads a prompt of random tokens and continues it.

    Prompt and continuation are shortened to what the model's positions allow.

    Args:
        model: A Hugging Face causal LM.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded greedily, one forward pass each.
        repeats: Timed repeats.
        warmup: Repeats before those, not timed.
        seed: Seed of the prompt.

    Raises:
        ConfigError: A length or the number of repeats is below one.
    """
    _check(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, warmup=warmup)
    prompt_tokens, new_tokens = _fit(prompt_tokens, new_tokens, max_positions(model.config))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator)
    device = next(model.parameters()).device
    with inference(model):
        times = [_measure_once(model, ids.to(device), new_tokens) for _ in range(warmup + repeats)][warmup:]
    prefill, decode = zip(*times, strict=True)
    return Latency(
        prefill_ms=statistics.median(prefill),
        prefill_spread_ms=(min(prefill), max(prefill)),
        decode_ms=statistics.median(decode),
        decode_spread_ms=(min(decode), max(decode)),
        device=device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )


def _check(*, warmup: int, **counts: int) -> None:
    if min(counts.values()) < 1 or warmup < 0:
        got = ", ".join(f"{name}={value}" for name, value in (counts | {"warmup": warmup}).items())
        raise ConfigError(f"Measuring speed needs at least one token and one repeat; got {got}.")


def _fit(prompt_tokens: int, new_tokens: int, limit: int | None) -> tuple[int, int]:
    """Returns both lengths, shortened to ``limit`` positions together; the continuation keeps at most half of them."""
    if limit is None:
        return prompt_tokens, new_tokens
    new_tokens = min(new_tokens, max(1, limit // 2))
    return min(prompt_tokens, limit - new_tokens), new_tokens


def _measure_once(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Returns the milliseconds of one prefill of ``ids`` [1, T], and per token decoded after it."""
    prefill, out = _timed(ids.device, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    decode, _ = _timed(ids.device, lambda: _decode(model, out, new_tokens))
    return 1000 * prefill, 1000 * decode / new_tokens


def _decode(model: Any, out: Any, new_tokens: int) -> Tensor:
    token: Tensor = out.logits[:, -1:].argmax(-1)
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return token


def _timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
