"""How byte-level BPE tokenizers cut a text into words, and the names that llama.cpp has for it."""

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from hfprune.utils.errors import ConfigError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, digits: str) -> str:
    """Returns the expression that cuts before upper-case letters."""
    words = f"{_START}{_UPPER}*{_LOWER}+{suffix}|{_START}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|\p{{N}}{digits}{_CASED_REST}"


_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _WORDS, _DIGITS = "bytes", "words of GPT-2", "single digits"

_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((_DIGITS, _WORDS), False): "smollm",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "dbrx",
    ((_QWEN2, _BYTES), False): "qwen2",
    ((_QWEN35, _BYTES), False): "qwen35",
    ((_cased("", ""), _BYTES), True): "tekken",
    ((_cased("", ""), _BYTES), False): "tekken",  # its words are in the vocabulary through merges
    ((_cased(f"{_CONTRACTIONS}?", "{1,3}"), _BYTES), False): "gpt-4o",
}
"""Steps of a pre-tokenizer, and whether whole words precede merges -> ``tokenizer.ggml.pre``."""


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        tokenizer: Content of ``tokenizer.json``.

    Raises:
        ConfigError: llama.cpp has no such pre-tokenizer, so that it would cut texts in other places.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    if (steps, whole) not in _NAMES:
        raise ConfigError(
            f"The tokenizer cuts words by {' and '.join(steps) or 'nothing'}, which no pre-tokenizer of llama.cpp that "
            "hfprune knows does. Convert it with llama.cpp's convert_hf_to_gguf.py, if that knows it."
        )
    found = _NAMES[steps, whole]
    return "smollm" if found == "gpt-2" and _digits_are_alone(tokenizer) else found


def _digits_are_alone(tokenizer: Mapping[str, Any]) -> bool:
    """Returns whether no token has a digit and another character.

    Such a vocabulary is cut the same with and without a cut around every digit. llama.cpp's converter names the first,
    whose decoder leaves spaces before punctuation alone.
    """
    for token in tokenizer["model"]["vocab"]:
        text = bytes(_BYTE_OF[letter] for letter in token if letter in _BYTE_OF).decode(errors="ignore")
        if len(text) > 1 and any(unicodedata.category(letter).startswith("N") for letter in text):
            return False
    return True


def _bytes_of_letters() -> dict[str, int]:
    """Returns the byte that each letter of a byte-level vocabulary stands for (GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _bytes_of_letters()


def _steps(part: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields the steps of a pre-tokenizer; an unknown one by its type."""
    if part is None:
        return
    kind = part["type"]
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        yield _WORDS if part.get("use_regex", True) else _BYTES
    elif kind == "Digits" and part.get("individual_digits"):
        yield _DIGITS
    elif kind == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
        yield str(next(iter(part["pattern"].values())))
    else:
        yield f"{kind} ({', '.join(f'{key}={value}' for key, value in part.items() if key != 'type')})"
