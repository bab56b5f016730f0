"""Prefill and decode speed at batch 1."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

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
    """
    limit = max_positions(model.config) or prompt_tokens + new_tokens
    new_tokens = min(new_tokens, max(1, limit // 2))
    prompt_tokens = min(prompt_tokens, limit - new_tokens)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator).to(device)
    prefill, decode = [], []
    with inference(model):
        for repeat in range(warmup + repeats):
            seconds, out = _timed(device, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
            more, _ = _timed(device, lambda out=out: _decode(model, out, new_tokens))
            if repeat >= warmup:
                prefill.append(1000 * seconds)
                decode.append(1000 * more / new_tokens)
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
