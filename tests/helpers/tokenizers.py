"""Small tokenizers of the kinds that GGUF states, each trained on Python's documentation, and texts to cut."""

from pydoc_data.topics import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "",
    "a",
    "Hello world",
    "  two spaces, then\ttabs\n\n and   lines \n",
    "I've 12345 reasons, you'RE right; it's 3.14% (or $1,234.56)!?",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass CamelCaseName: ...\n",
    "na\u00efve \u00e9t\u00e9 \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\uff0c\u4e16\u754c \ud55c\uad6d\uc5b4 \U0001f642\U0001f999",
    "<|start|>user<|end|> the statement</s>",
    "trailing space ",
]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


def _split(regex):
    return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_BYTE_LEVEL = {
    "gpt-2": ([_WORDS], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), _WORDS], False),
    "llama-bpe": (_split(_LLAMA3), True),
    "dbrx": (_split(_LLAMA3), False),
    "qwen2": (_split(_QWEN2), False),
    "qwen35": (_split(_QWEN35), False),
    "tekken": (_split(_CASED % ("", "", "")), True),
    "gpt-4o": (_split(_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", "{1,3}")), False),
}
KINDS = (*_BYTE_LEVEL, "sentencepiece", "sentencepiece without prefix", "sentencepiece with added tokens", "unigram")
_SPECIAL = ["<unk>", "<s>", "</s>"]


def smollm2():
    """Returns the tokenizer of the embedded model."""
    from hfprune.io.demo_model import embedded_model

    return AutoTokenizer.from_pretrained(embedded_model())


def trained(kind):
    """Returns a tokenizer of ``kind`` of about 400 tokens, with BOS and one added control token pair."""
    if kind in _BYTE_LEVEL:
        tokenizer = _byte_level(*_BYTE_LEVEL[kind])
    elif kind == "unigram":
        tokenizer = _unigram()
    else:
        tokenizer = _sentencepiece(prefix=kind == "sentencepiece")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (*_SPECIAL, "<|start|>", "<|end|>")])
    if kind == "sentencepiece with added tokens":  # as Gemma's
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("\n\n", "  ", "comment")])
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.post_processor = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template="{{ messages }}"
    )


def _text():
    return [topics["assert"], topics["integers"], topics["while"], *TEXTS[2:6]]


def _byte_level(steps, ignore_merges):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


def _sentencepiece(*, prefix):
    """Returns a BPE with all merges of its vocabulary, by the rank of what they make, as converted models have."""
    import json

    first = Tokenizer(models.BPE())
    first.pre_tokenizer = pre_tokenizers.Metaspace()
    first.train_from_iterator(_text(), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    merged = ["".join(merge) for merge in json.loads(first.to_str())["model"]["merges"]]
    letters = [token for token in first.get_vocab() if len(token) == 1]
    names = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *sorted(letters)]
    ids = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [
        (token[:cut], token[cut:])
        for token in dict.fromkeys(merged)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _unigram():
    """Returns a tokenizer with the steps of converted SentencePiece models (T5), without a map of characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer
