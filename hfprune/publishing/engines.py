"""Engines: which quantisers and which number of devices can use the widths of a model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROW_GROUPS = {
    32: "GGUF Q8_0 and Q4_0",
    64: "bitsandbytes nf4, MLX, torchao and OpenVINO 4 bit",
    128: "GPTQ, AWQ, llm-compressor (group 128)",
    256: "GGUF K-quants",
}
"""Number that every row of a quantised matrix must be a multiple of -> the formats that need it (docs/serving.md)."""

SERVING = {"vllm": 64, "int4": 128, "gguf": 256}
"""How a model will be served -> multiple that its widths need: float or 8 bit in vLLM; GPTQ, AWQ and llm-compressor
with their group of 128; K-quants of GGUF."""

_DEVICES = (2, 4, 8)


def largest_multiple(widths: Iterable[int]) -> int:
    """Returns the largest power of two, up to 256, that divides all widths; 1 for odd ones.

    >>> largest_multiple([1024, 512]), largest_multiple([1017]), largest_multiple([96, 64])
    (256, 1, 32)
    """
    found = 256
    for width in widths:
        while width % found:
            found //= 2
    return found


def quantised_formats(widths: Iterable[int], hidden_size: int) -> list[str]:
    """Returns the formats whose groups fit the rows of all projections: the widths, and the hidden size.

    Args:
        widths: MLP widths.
        hidden_size: Size of the residual stream; it limits a dense model in the same way.

    >>> quantised_formats([1024], 576)
    ['GGUF Q8_0 and Q4_0', 'bitsandbytes nf4, MLX, torchao and OpenVINO 4 bit']
    >>> quantised_formats([1017], 2048)
    []
    """
    multiple = largest_multiple([*widths, hidden_size])
    return [formats for group, formats in ROW_GROUPS.items() if multiple % group == 0]


def splits(widths: Iterable[int], heads: Sequence[int]) -> list[int]:
    """Returns over how many devices (2, 4, 8) tensor parallelism can split the model evenly.

    Args:
        widths: MLP widths.
        heads: Numbers of query heads and of key-value heads.

    >>> splits([1024], [8, 2]), splits([1017], [8, 2])
    ([2], [])
    """
    numbers = [*widths, *heads]
    return [devices for devices in _DEVICES if not any(number % devices for number in numbers)]


def width_advice(widths: Sequence[int], dense_widths: Sequence[int]) -> str:
    """Returns which quantised formats the pruned widths lose, and what to do; empty where none.

    Args:
        widths: MLP widths of the pruned model; the rows of its down projections.
        dense_widths: Those of the dense model.

    >>> width_advice([1017], [1536])
    'Quantised formats that the dense widths fit and multiples of 1 do not: GGUF Q8_0 and Q4_0; bitsandbytes nf4, MLX, \
torchao and OpenVINO 4 bit; GPTQ, AWQ, llm-compressor (group 128); GGUF K-quants. Use round_to=256.'
    >>> width_advice([1024], [1536])
    ''
    """
    multiple, dense = largest_multiple(widths), largest_multiple(dense_widths)
    lost = [formats for group, formats in ROW_GROUPS.items() if dense % group == 0 and multiple % group]
    if not lost:
        return ""
    return (
        f"Quantised formats that the dense widths fit and multiples of {multiple} do not: {'; '.join(lost)}. "
        f"Use round_to={dense}."
    )


def gguf_lines(file: Path, saved: Mapping[str, Any]) -> list[str]:
    """Returns what an export to GGUF wrote, one topic a line.

    Args:
        file: The file.
        saved: Result of :func:`hfprune.io.gguf.export_gguf`.

    >>> saved = {"bytes": 2**21, "gguf_type": "q8_0", "architecture": "deci", "unquantised": ["a", "b"], "window": None}
    >>> for line in gguf_lines(Path("m.gguf"), saved):
    ...     print(line)
    Saved to m.gguf (2 MiB, q8_0, architecture deci)
    2 matrices have rows that are no multiple of 32 and remain f16: use round_to=32, or 256 for K-quants.
    Loads in: llama.cpp.
    """
    size = f"{saved['bytes'] / 2**20:,.0f} MiB"
    lines = [f"Saved to {file} ({size}, {saved['gguf_type']}, architecture {saved['architecture']})"]
    if saved["unquantised"]:
        lines.append(
            f"{len(saved['unquantised'])} matrices have rows that are no multiple of 32 and remain f16: use "
            "round_to=32, or 256 for K-quants."
        )
    if saved["window"] is not None:
        lines.append(
            f"llama.cpp computes no sliding window for this class: the context length is {saved['window']}, up to "
            "which both agree."
        )
    return [*lines, "Loads in: llama.cpp."]


def serving_advice(widths: Iterable[int], hidden_size: int, serve: str) -> str:
    """Returns what the achieved widths and the hidden size prevent; empty if they will do.

    Args:
        widths: MLP widths; the rows of the down projections.
        hidden_size: Size of the residual stream; the rows of the other projections. Pruned or not, it limits 4 bits.
        serve: Name in :data:`SERVING`.

    >>> serving_advice([1024, 1536], 2048, "gguf"), serving_advice([1017], 576, "vllm")
    ('', "MLP width 1017 is no multiple of 64, as serve='vllm' needs: use round_to=64.")
    >>> serving_advice([1024], 576, "int4")
    "The hidden size 576 is no multiple of 128, as serve='int4' needs: give the quantiser a group of 64."
    """
    step = SERVING[serve]
    wrong = [width for width in widths if width % step]
    if wrong:
        return f"MLP width {wrong[0]} is no multiple of {step}, as serve='{serve}' needs: use round_to={step}."
    if serve == "vllm" or hidden_size % step == 0:
        return ""
    group = largest_multiple([hidden_size])
    text = f"The hidden size {hidden_size} is no multiple of {step}, as serve='{serve}' needs:"
    if serve == "gguf":
        return f"{text} K-quants store rows of that size in Q8_0 or Q5_0, as in the dense model."
    return f"{text} give the quantiser a group of {group}." if group >= 32 else f"{text} use 8 bits per channel."
