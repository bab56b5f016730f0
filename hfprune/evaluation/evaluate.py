"""Evaluation: perplexity, fidelity, size, speed and sample texts of one model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune.evaluation.fidelity import Reference, compare_windows, fidelity_of
from hfprune.evaluation.perplexity import (
    Perplexity,
    ScoredLogits,
    Windows,
    checked_windows,
    perplexity_from,
    perplexity_of,
)
from hfprune.evaluation.predictions import Fidelity
from hfprune.evaluation.size_and_speed import Latency, Size, compare_latency, measure_latency, measure_size
from hfprune.models import mlp_widths, output_head, parameter_count
from hfprune.models.contexts import inference
from hfprune.models.forward import window_hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Results of one model; None if not measured.

    Attributes:
        parameters: Number of parameters, tied weights once.
        width: MLP width of all layers; None if layers differ, and for mixtures of experts.
        widths: MLP width of each layer; empty for mixtures of experts.
        size: Bytes, multiply-accumulates, key-value cache.
        perplexity: Perplexity on the evaluation windows.
        fidelity: Fidelity to the dense model on the same windows.
        latency: Prefill and decode speed.
        seconds: Duration of the evaluation.
    """

    parameters: int
    width: int | None
    widths: tuple[int, ...]
    size: Size
    perplexity: Perplexity | None
    fidelity: Fidelity | None
    latency: Latency | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the measured results as plain data."""
        parts = {
            "size": self.size,
            "perplexity": self.perplexity,
            "fidelity": self.fidelity,
            "latency": self.latency,
        }
        known = {name: part.to_dict() for name, part in parts.items() if part is not None}
        widths: dict[str, Any] = {"width": self.width, "widths": list(self.widths)}
        if self.widths and self.width is None:
            widths["mean_width"] = sum(self.widths) / len(self.widths)
        return {"parameters": self.parameters, **widths, **known, "seconds": self.seconds}


def measure(
    model: Any,
    windows: Tensor | Windows | None,
    *,
    reference: Reference | None,
    latency: bool,
    folder: str | None = None,
    hidden: Tensor | None = None,
    known: tuple[Perplexity, Fidelity] | None = None,
) -> Measurement:
    """Returns the results of ``model``, with one forward pass for perplexity and fidelity.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()
    >>> figures = measure(model, torch.arange(20).view(2, 10), reference=None, latency=False)
    >>> figures.widths, figures.perplexity.num_tokens, figures.fidelity is None
    ((24, 24), 18, True)

    Args:
        model: A supported Hugging Face causal LM, without adapters.
        windows: Evaluation windows [N, W]; None to measure neither perplexity nor fidelity.
        reference: The dense model's predictions on the same windows.
        latency: Whether to measure speed.
        folder: Folder of the saved model, for its size on disk.
        hidden: Final hidden states [N, W, D] of ``model`` on the windows if already computed, as in the reference of
            the dense model.
        known: Perplexity and fidelity if already computed.

    Raises:
        ConfigError: There are no windows, or the vocabularies of model and reference differ.
    """
    start = time.perf_counter()
    widths = mlp_widths(model)
    found: Perplexity | None = None
    close: Fidelity | None = None
    if known is not None:
        found, close = known
    elif windows is not None:
        found, close = _predictions(model, windows, reference, hidden)
    return Measurement(
        parameters=parameter_count(model),
        width=widths[0] if len(set(widths)) == 1 else None,
        widths=widths,
        size=measure_size(model, folder=folder),
        perplexity=found,
        fidelity=close,
        latency=measure_latency(model) if latency else None,
        seconds=time.perf_counter() - start,
    )


def _predictions(
    model: Any, windows: Tensor | Windows, reference: Reference | None, hidden: Tensor | None
) -> tuple[Perplexity, Fidelity | None]:
    """Returns perplexity and fidelity, from the same logits if windows do not overlap."""
    cut = checked_windows(windows)
    hidden = window_hidden(model, cut.ids) if hidden is None else hidden
    head = output_head(model)
    if reference is None or cut.overlap:
        figures = perplexity_of(hidden, head, cut)
        return figures, None if reference is None else fidelity_of(reference, hidden, head)
    rows = [ScoredLogits(head, row, ids) for row, ids in zip(hidden, cut.ids, strict=True)]
    close = compare_windows(reference, rows)
    return perplexity_from([row.nll for row in rows], cut), close


def add_speeds(stages: Mapping[str, dict[str, Any]], models: Mapping[str, Any]) -> None:
    """Adds ``latency`` to every stage; models are timed in alternation, with ratios relative to the first."""
    speeds = compare_latency(list(models.values()))
    for name, speed in zip(models, speeds, strict=True):
        stages[name]["latency"] = speed.to_dict()


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of nested results by their path, for loggers, without text and lists.

    >>> flat({"parameters": 3, "perplexity": {"value": 2.5, "protocol": "text"}})
    {'parameters': 3.0, 'perplexity/value': 2.5}
    """
    numbers: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{key}": number for key, number in flat(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = float(value)
    return numbers


PROMPT_TOKENS = 32
NEW_TOKENS = 48


def continuations(
    model: Any, tokenizer: Any, windows: Tensor, *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS
) -> list[tuple[str, str]]:
    """Returns a prompt and its greedy continuation for each window.

    Args:
        model: A Hugging Face causal LM.
        tokenizer: Its tokenizer.
        windows: Token ids [N, W]; the prompt is at most the first half of a window.
        prompt_tokens: Length of the prompts.
        new_tokens: Maximum number of generated tokens.
    """
    prompt_tokens = min(prompt_tokens, max(1, windows.shape[1] // 2))
    new_tokens = min(new_tokens, max(1, windows.shape[1] - prompt_tokens))  # a window fits the model's positions
    device = next(model.parameters()).device
    pairs = []
    for window in windows:
        ids = window[None, :prompt_tokens].to(device)
        with inference(model):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=_pad(tokenizer),
            )
        pairs.append((tokenizer.decode(ids[0]), tokenizer.decode(out[0, prompt_tokens:], skip_special_tokens=True)))
    return pairs


def _pad(tokenizer: Any) -> int:
    """Returns a padding id, which is not used for a single prompt, to avoid a warning of ``generate``."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))
