"""Tokenizers in GGUF files: kinds, names of pre-tokenizers, types of tokens, special tokens, and what is refused."""

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfprune.io.gguf.sentencepiece_bpe import cut, scores_of
from hfprune.io.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny_tokenizer
from tests.helpers.tokenizers import KINDS, trained

BYTE_LEVEL = [kind for kind in KINDS if not kind.startswith(("sentencepiece", "unigram"))]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_the_name_of_a_pre_tokenizer_follows_from_its_steps(kind):
    tokenizer = trained(kind)
    found = vocabulary(tokenizer, len(tokenizer) + 2)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", kind)
    assert found["tokenizer.ggml.merges"][0].count(" ") == 1
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert types[-2:] == [UNUSED, UNUSED]
    assert {types[tokenizer.convert_tokens_to_ids(name)] for name in ("<s>", "</s>", "<|start|>")} == {CONTROL}
    assert types[tokenizer.convert_tokens_to_ids("a")] == NORMAL
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (1, True)
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.add_eos_token"]) == (2, False)
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_digits_that_are_always_alone_name_the_pre_tokenizer_of_single_digits():
    def named(*words):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = {letter: i for i, letter in enumerate([*letters, *words])}
        tokenizer = Tokenizer(models.BPE(tokens, [tuple(word) for word in words]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(tokens))["tokenizer.ggml.pre"]

    assert named("ab") == "smollm"
    assert named("ab", "12") == named("\u01201") == "gpt-2"  # a space and a digit


def test_sentencepiece_has_scores_bytes_and_a_prefix():
    for kind in ("sentencepiece", "sentencepiece without prefix", "sentencepiece with added tokens"):
        prefix, tokenizer = kind == "sentencepiece", trained(kind)
        found = vocabulary(tokenizer, len(tokenizer))
        assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", prefix)
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        assert types[tokens.index("<0x0A>")] == BYTE
        assert types[tokens.index("<unk>")] == UNKNOWN
        scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
        merged = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL and len(token) > 1]
        assert [scores[token] for token in merged] == sorted((scores[token] for token in merged), reverse=True)


def test_merges_that_scores_do_not_reproduce_are_refused():
    """Here t and he are neighbours that no merge joins, but llama.cpp joins all that make a token."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *"the", "he", "th", "the", "<unk>"]
    merges = [("h", "e"), ("t", "h"), ("th", "e")]
    ids = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    with pytest.raises(ConfigError, match="would cut texts in other places"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(names))
    tokenizer.model = models.BPE(ids, [*merges, ("t", "he")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(names))


def test_scores_rank_what_merges_make():
    merges = [("a", "b"), ("ab", "c"), ("b", "c")]
    scores = scores_of(merges)
    assert scores == {"ab": 0.0, "abc": -1.0, "bc": -2.0}
    ids = {token: i for i, token in enumerate(["a", "b", "c", *scores])}
    assert cut("abcbcab", scores, ids) == ["abc", "bc", "ab"]
    assert cut("axb", scores, ids) == ["a", "x", "b"]
    assert cut("", scores, ids) == []


def test_unigram_has_the_scores_of_the_tokenizer():
    tokenizer = trained("unigram")
    found = vocabulary(tokenizer, len(tokenizer))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.remove_extra_whitespaces"]) == ("t5", True)
    index = next(i for i, kind in enumerate(found["tokenizer.ggml.token_type"]) if kind == NORMAL)
    token = found["tokenizer.ggml.tokens"][index]
    import json

    own = dict(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"])
    assert found["tokenizer.ggml.scores"][index] == own[token]


def test_added_tokens_that_are_not_special_are_read_from_texts():
    tokenizer = trained("llama-bpe")
    tokenizer.add_tokens(["word\u2581s"])
    found = vocabulary(tokenizer, len(tokenizer))
    assert (found["tokenizer.ggml.tokens"][-1], found["tokenizer.ggml.token_type"][-1]) == ("word s", USER_DEFINED)


@pytest.mark.parametrize(("ends", "expected"), [(None, None), (2, None), ([2, 7], 7), (9, 9)])
def test_the_token_that_ends_a_turn_is_that_of_the_generation_config(ends, expected):
    tokenizer = trained("qwen2")
    found = vocabulary(tokenizer, len(tokenizer), ends=ends)
    assert found.get("tokenizer.ggml.eot_token_id") == expected
    assert found["tokenizer.ggml.eos_token_id"] == 2


def test_named_chat_templates():
    tokenizer = trained("qwen2")
    tokenizer.chat_template = {"default": "d", "tool_use": "t"}
    found = vocabulary(tokenizer, len(tokenizer))
    assert found["tokenizer.chat_template"] == "d"
    assert found["tokenizer.chat_template.tool_use"] == "t"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_no_tokenizer_is_a_file_of_ids():
    assert vocabulary(None, 10) == {"tokenizer.ggml.model": "none"}


def other(model=None, *, normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(model or models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
REFUSED = {
    "words": (tiny_tokenizer, "cuts words by Whitespace"),
    "own regex": (
        lambda: other(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x+"), "isolated"), BYTES])),
        r"cuts words by x\+ and words of GPT-2",
    ),
    "prefix": (lambda: other(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space=True"),
    "nothing": (other, "cuts words by nothing"),
    "lower case": (lambda: other(normalizer=normalizers.Lowercase(), pre_tokenizer=BYTES), "normalises texts"),
    "lower case in a sequence": (
        lambda: other(normalizer=normalizers.Sequence([normalizers.Lowercase()]), pre_tokenizer=BYTES),
        "normalises texts",
    ),
    "no merges": (lambda: other(models.BPE({"a": 0}, []), pre_tokenizer=BYTES), "no merges"),
    "word pieces": (lambda: other(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "of type WordPiece"),
    "unigram with bytes": (
        lambda: other(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=True)),
        "falls back to bytes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        vocabulary(make(), 70)


def test_ids_beyond_the_embeddings_are_refused():
    tokenizer = trained("qwen2")
    with pytest.raises(ConfigError, match="the model has 50 embeddings"):
        vocabulary(tokenizer, 50)
