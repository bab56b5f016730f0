"""What a model weighs: parameters, bytes, multiply-accumulates, key-value cache."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from hfprune.arch import parameter_count
from hfprune.layouts import empty_copy, run_empty
from hfprune.loading import max_positions

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Figures that follow from shapes alone, and the files' size.

    Attributes:
        weight_bytes: Bytes of the parameters in memory, tied weights once.
        disk_bytes: Bytes of the weight files of a saved model; None for one that is only in memory.
        macs: Multiply-accumulates of one forward pass over ``tokens`` tokens with logits at every one, attention
            included.
        kv_cache_bytes: Bytes of keys and values of ``tokens`` tokens at batch 1.
        tokens: Tokens that the two refer to.
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
    """Returns the size of ``model``; its weights are not touched.

    Args:
        model: A Hugging Face causal LM.
        folder: Where it is saved.
        tokens: Length of the sequence, shortened to what the model's positions allow.
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
    """Returns the bytes of the weight files in ``folder``, None when there are none."""
    if folder is None or not Path(folder).is_dir():
        return None
    files = {path for pattern in WEIGHT_FILES for path in Path(folder).glob(pattern)}
    return sum(path.stat().st_size for path in files) or None


def _cache_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)
