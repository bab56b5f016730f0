"""Tokenizer of a model as keys of a GGUF file: byte-level BPE, SentencePiece BPE, and Unigram."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from hfprune.io.gguf.pre_tokenizers import pre_tokenizer_name
from hfprune.io.gguf.rope import Metadata
from hfprune.io.gguf.sentencepiece_bpe import cuts_alike, scores_of
from hfprune.utils.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of a token in ``tokenizer.ggml.token_type``."""

_SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "sep_token_id": "seperator_token_id",  # so spelled in the format
    "pad_token_id": "padding_token_id",
    "cls_token_id": "cls_token_id",
    "mask_token_id": "mask_token_id",
}
"""Attribute of a tokenizer -> key."""


def vocabulary(tokenizer: Any, size: int, *, ends: Any = None) -> Metadata:
    """Returns the tokenizer, its special tokens and its chat template.

    Args:
        tokenizer: The model's tokenizer, or None: the file then has no vocabulary, and llama.cpp takes token ids only.
        size: Rows of the token embedding; ids without a token are filled.
        ends: ``eos_token_id`` of the generation config, a number or a list.

    Raises:
        ConfigError: llama.cpp does not have this kind of tokenizer, or would cut texts in other places.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"The tokenizer {type(tokenizer).__name__} is written in Python, and only tokenizers with a tokenizer.json "
            "can be written as GGUF."
        )
    content = json.loads(backend.to_str())
    tokens, types = _tokens(tokenizer, content, size)
    found = _model(backend, content, tokens, types)
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return found | _special_tokens(tokenizer, ends) | _chat_template(tokenizer)


def _tokens(tokenizer: Any, content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the text and the type of every id."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if names and max(names) >= size:
        raise ConfigError(f"The tokenizer has ids up to {max(names)}, the model has {size} embeddings.")
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    unknown = content["model"].get("unk_token")
    if content["model"].get("unk_id") is not None:
        unknown = content["model"]["vocab"][content["model"]["unk_id"]][0]
    tokens, types = [], []
    for number in range(size):
        token, kind = names.get(number, f"[PAD{number}]"), NORMAL
        if number not in names:
            kind = UNUSED
        elif (content["model"]["type"] != "BPE" and token == unknown) or (token == unknown and _has_bytes(content)):
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] or _looks_special(token) else USER_DEFINED
            token = token if kind == CONTROL else token.replace("▁", " ")
        elif _has_bytes(content) and _is_byte(token):
            kind = BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _has_bytes(content: Mapping[str, Any]) -> bool:
    return bool(content["model"].get("byte_fallback"))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _looks_special(token: str) -> bool:
    """Returns whether an added token that is not declared special is a control token by its form."""
    forms = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>") or any(token.startswith(a) and token.endswith(b) for a, b in forms)


def _model(backend: Any, content: Mapping[str, Any], tokens: list[str], types: list[int]) -> Metadata:
    kind = content["model"]["type"]
    if kind == "BPE" and _has_bytes(content):
        return _sentencepiece(backend, content, tokens, types)
    if kind == "BPE":
        return _byte_level(content)
    if kind == "Unigram":
        return _unigram(content, tokens, types)
    raise ConfigError(f"The tokenizer is of type {kind}; GGUF states BPE and Unigram.")


def _byte_level(content: Mapping[str, Any]) -> Metadata:
    steps = [part["type"] for part in _flat(content.get("normalizer"), "normalizers")]
    if set(steps) - {"NFC"}:  # llama.cpp's converter leaves out NFC, too
        raise ConfigError(f"The tokenizer normalises texts ({', '.join(steps)}), which llama.cpp does not.")
    if content["model"].get("continuing_subword_prefix") or content["model"].get("end_of_word_suffix"):
        raise ConfigError("The tokenizer marks the parts of words, which llama.cpp's BPE does not.")
    name = pre_tokenizer_name(content)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if not merges:
        raise ConfigError("The tokenizer has no merges, which llama.cpp requires.")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _prefixed(backend: Any) -> bool:
    """Returns whether texts start with a space."""
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith("▁")


def _sentencepiece(backend: Any, content: Mapping[str, Any], tokens: list[str], types: list[int]) -> Metadata:
    merges = content["model"]["merges"]
    known = scores_of(merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    prefix = _prefixed(backend)
    ids = {token: number for number, token in enumerate(tokens) if types[number] in (NORMAL, BYTE)}
    added = {token: number for number, token in enumerate(tokens) if types[number] == USER_DEFINED}
    if not cuts_alike(backend, known, ids, added=added, prefix=prefix):
        raise ConfigError(
            "The tokenizer falls back to bytes, and its merges are not those of a SentencePiece model: llama.cpp, "
            "which merges by the score of a token, would cut texts in other places."
        )
    lowest = -float(len(merges))
    scores = [known.get(token, lowest) if types[number] == NORMAL else -1000.0 for number, token in enumerate(tokens)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _unigram(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> Metadata:
    model, normalizers = content["model"], list(_flat(content.get("normalizer"), "normalizers"))
    if model.get("byte_fallback"):
        raise ConfigError("The tokenizer is of type Unigram and falls back to bytes, which llama.cpp does not.")
    known = dict(model["vocab"])
    maps = [part["precompiled_charsmap"] for part in normalizers if part["type"] == "Precompiled"]
    shortens = any(part["type"] == "Replace" and "{2,}" in str(part.get("pattern")) for part in normalizers)
    others = {part["type"] for part in normalizers} - {"Precompiled", "Replace", "Strip", "Prepend"}
    if others:
        raise ConfigError(f"The tokenizer normalises texts ({', '.join(sorted(others))}), which llama.cpp does not.")
    scores = [
        float(known.get(token, -1000.0)) if types[i] in (NORMAL, UNKNOWN) else 0.0 for i, token in enumerate(tokens)
    ]
    if not all(math.isfinite(score) for score in scores):
        raise ConfigError("The tokenizer holds scores that are not finite.")
    metaspace = [p for p in _flat(content.get("pre_tokenizer"), "pretokenizers") if p["type"] == "Metaspace"]
    prefix = any(part.get("prepend_scheme", "always") != "never" for part in metaspace)
    found: Metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix or any(part["type"] == "Prepend" for part in normalizers),
        "tokenizer.ggml.remove_extra_whitespaces": shortens,
    }
    if maps:
        found["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(maps[0])
    return found


def _flat(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _flat(inner, key)] if part["type"] == "Sequence" else [part]


def _special_tokens(tokenizer: Any, ends: Any) -> Metadata:
    """Returns the ids of special tokens, and whether BOS and EOS are added to a text."""
    found: Metadata = {}
    for attribute, key in _SPECIAL.items():
        value = getattr(tokenizer, attribute, None)
        if value is not None:
            found[f"tokenizer.ggml.{key}"] = int(value)
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found["tokenizer.ggml.add_bos_token"] = bos is not None and bool(ids) and ids[0] == bos
    found["tokenizer.ggml.add_eos_token"] = eos is not None and len(ids) > 1 and ids[-1] == eos
    further = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, eos)]
    if eos is None and further:
        found["tokenizer.ggml.eos_token_id"] = int(further.pop(0))
    if further:
        found["tokenizer.ggml.eot_token_id"] = int(further[-1])  # ends a turn
    return found


def _chat_template(tokenizer: Any) -> Metadata:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    found: Metadata = {f"tokenizer.chat_template.{n}": text for n, text in template.items() if n != "default"}
    found |= {"tokenizer.chat_templates": sorted(name for name in template if name != "default")} if found else {}
    return found | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})
