"""Size and speed of a model: bytes, multiply-accumulates, latency, throughput and peak memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hfprune.io.layouts import empty_copy, run_empty
from hfprune.io.load import max_positions
from hfprune.models import parameter_count
from hfprune.models.contexts import inference
from hfprune.utils.compat import LiveBytes
from hfprune.utils.errors import ConfigError
from hfprune.utils.progress import phase

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Size of a model in memory, on disk and in operations.

    Attributes:
        weight_bytes: Size of the parameters in memory, tied weights once.
        disk_bytes: Size of the weight files, or None for a model that is not saved.
        macs: Multiply-accumulates of a forward pass over ``tokens`` tokens, including attention and all logits.
        kv_cache_bytes: Size of keys and values of ``tokens`` tokens at batch size 1.
        tokens: Number of tokens for ``macs`` and ``kv_cache_bytes``.
    """

    weight_bytes: int
    disk_bytes: int | None
    macs: int
    kv_cache_bytes: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, for reports."""
        return asdict(self)


def measure_size(model: Any, *, folder: str | Path | None = None, tokens: int = 256) -> Size:
    """Returns the size of ``model``, computed from shapes; no weight is read.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()
    >>> size = measure_size(model, tokens=8)
    >>> size.weight_bytes == 4 * model.num_parameters(), size.tokens, size.disk_bytes is None
    (True, 8, True)

    Args:
        model: A Hugging Face causal LM.
        folder: Folder of the saved model, or None.
        tokens: Sequence length, limited by the model's maximum.
    """
    tokens = min(tokens, max_positions(model.config) or tokens)
    shell = empty_copy(model).to(next(model.parameters()).dtype).eval()
    counter = FlopCounterMode(display=False)
    with counter:
        out = run_empty(shell, tokens=tokens)
    return Size(
        weight_bytes=parameter_count(model) * int(next(model.parameters()).element_size()),
        disk_bytes=disk_bytes(folder),
        macs=counter.get_total_flops() // 2,
        kv_cache_bytes=_cache_bytes(out.past_key_values),
        tokens=tokens,
    )


def disk_bytes(folder: str | Path | None) -> int | None:
    """Returns the size of the weight files in ``folder`` in bytes, or None if there are none."""
    if folder is None or not Path(folder).is_dir():
        return None
    files = {path for pattern in WEIGHT_FILES for path in Path(folder).glob(pattern)}
    return sum(path.stat().st_size for path in files) or None


def _cache_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)  # an unused entry has none


def peak_bytes(model: Any, run: Callable[[], object]) -> int:
    """Returns the size of the weights plus the peak memory allocated by ``run``, in bytes.

    On CUDA, the peak is measured by the allocator. On other devices, the storages of the tensors returned by operators
    are counted, without temporary memory of kernels.

    Args:
        model: A Hugging Face causal LM.
        run: Function that is called once, such as a forward pass of ``model``.
    """
    weights = parameter_count(model) * int(next(model.parameters()).element_size())
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return weights + int(torch.cuda.max_memory_allocated(device)) - int(before)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        run()
    return weights + int(live.peak)


Spread = tuple[float, float]
"""Smallest and largest value over repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Prefill and decode speed: medians over repeats, after a warm-up.

    Attributes:
        prefill_ms: Time of a forward pass over the prompt, milliseconds.
        prefill_spread_ms: Fastest and slowest repeat.
        decode_ms: Time of greedy decoding with a cache, milliseconds per token.
        decode_spread_ms: Fastest and slowest repeat.
        peak_bytes: Peak memory including the weights, see :func:`peak_bytes`.
        device: Device type.
        dtype: Dtype of the weights.
        threads: CPU threads of the process.
        prompt_tokens: Length of the prompt.
        new_tokens: Decoded tokens.
        repeats: Number of repeats.
        prefill_ratio: Median over repeats of the prefill time relative to the first model; None for the first model.
        prefill_ratio_spread: Smallest and largest of these ratios.
        decode_ratio: Median over repeats of the decode time relative to the first model.
        decode_ratio_spread: Smallest and largest of these ratios.
    """

    prefill_ms: float
    prefill_spread_ms: Spread
    decode_ms: float
    decode_spread_ms: Spread
    peak_bytes: int
    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_ratio: float | None = None
    prefill_ratio_spread: Spread | None = None
    decode_ratio: float | None = None
    decode_ratio_spread: Spread | None = None

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
    """Returns the prefill and decode speed of ``model`` for random tokens; arguments as in :func:`compare_latency`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()
    >>> latency = measure_latency(model, prompt_tokens=8, new_tokens=2, repeats=3)
    >>> latency.prompt_tokens, latency.repeats, latency.prefill_ratio is None
    (8, 3, True)
    """
    (latency,) = compare_latency(
        [model], prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, warmup=warmup, seed=seed
    )
    return latency


def compare_latency(
    models: Sequence[Any],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> list[Latency]:
    """Returns the prefill and decode speed of each model, measured in alternation.

    Models alternate within every repeat, so that other load on the machine affects all of them. Ratios to the first
    model are computed per repeat. Prompt and continuation are limited by the models' maximum length.

    Args:
        models: Hugging Face causal LMs, the dense one first.
        prompt_tokens: Length of the prompt of random tokens.
        new_tokens: Number of tokens decoded greedily, one forward pass each.
        repeats: Number of timed repeats.
        warmup: Number of untimed repeats.
        seed: Seed of the prompt.

    Raises:
        ConfigError: A length or the number of repeats is below one.
    """
    _check(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, warmup=warmup)
    for model in models:
        prompt_tokens, new_tokens = _fit(prompt_tokens, new_tokens, max_positions(model.config))
    vocab = min(model.config.vocab_size for model in models)
    ids = torch.randint(vocab, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    with phase("timing prefill and decoding", total=warmup + repeats, unit="repetition") as current:
        for turn in range(warmup + repeats):
            for model, measured in zip(models, times, strict=True):
                with inference(model):
                    measured.append(_measure_once(model, ids.to(_device(model)), new_tokens))
            current.update(turn + 1)
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    times = [measured[warmup:] for measured in times]
    return [
        _latency(model, measured, None if index == 0 else times[0], ids, settings)
        for index, (model, measured) in enumerate(zip(models, times, strict=True))
    ]


def _latency(
    model: Any,
    times: list[tuple[float, float]],
    base: list[tuple[float, float]] | None,
    ids: Tensor,
    settings: Mapping[str, int],
) -> Latency:
    figures: dict[str, Any] = dict(settings)
    for column, name in enumerate(("prefill", "decode")):
        values = [row[column] for row in times]
        figures |= {f"{name}_ms": statistics.median(values), f"{name}_spread_ms": (min(values), max(values))}
        if base is not None:
            ratios = [value / row[column] for value, row in zip(values, base, strict=True)]
            figures |= {f"{name}_ratio": statistics.median(ratios)}
            figures |= {f"{name}_ratio_spread": (min(ratios), max(ratios))}
    device = _device(model)
    with inference(model):
        peak = peak_bytes(model, lambda: _measure_once(model, ids.to(device), 2))
    return Latency(
        **figures,
        peak_bytes=peak,
        device=device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _check(*, warmup: int, **counts: int) -> None:
    if min(counts.values()) < 1 or warmup < 0:
        values = ", ".join(f"{name}={value}" for name, value in (counts | {"warmup": warmup}).items())
        raise ConfigError(f"{values}: lengths and repeats must be at least 1, warmup at least 0.")


def _fit(prompt_tokens: int, new_tokens: int, limit: int | None) -> tuple[int, int]:
    """Returns both lengths, limited to ``limit`` positions in total and half of them for the continuation."""
    if limit is None:
        return prompt_tokens, new_tokens
    new_tokens = min(new_tokens, max(1, limit // 2))
    return min(prompt_tokens, limit - new_tokens), new_tokens


def _measure_once(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Returns the time of one prefill of ``ids`` [1, T] and of each decoded token, in milliseconds."""
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
