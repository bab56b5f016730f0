"""GGUF files in llama.cpp: the same greedy tokens, logits and tokenizers as in transformers, and the stock converter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import hfprune
from hfprune.io.gguf import export_gguf
from hfprune.io.save import export_model
from hfprune.models import ARCHITECTURES, find_groups, register
from tests.helpers.tokenizers import KINDS, TEXTS, smollm2, trained

PYTHON = os.environ.get("HFPRUNE_LLAMA_CPP", "")
CONVERTER = os.environ.get("HFPRUNE_LLAMA_CPP_CONVERTER", "")
ENGINE = Path(__file__).parents[1] / "helpers" / "llama_cpp_engine.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="HFPRUNE_LLAMA_CPP names no python with xllamacpp: make serve-llama-cpp test-serve"
    ),
]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ONE_KEY = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
THETA = 7777.0
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.2, 2.4, 2.6]}


def rope(kind="default", **values):
    return {"rope_type": kind, "rope_theta": THETA, **values}


def family(name):
    """Returns the config of a family: its own heads, ties, biases, windows and rotary scaling."""
    full, local = rope("linear", factor=2.0), {"rope_type": "default", "rope_theta": 55.0}
    moe = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    gemma = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    return {
        "llama": lambda: LlamaConfig(**SIZES, rope_parameters=rope(), tie_word_embeddings=True),
        "llama3": lambda: LlamaConfig(**SIZES, head_dim=16, rope_parameters=rope("llama3", **LLAMA3)),
        "llama_bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, rope_parameters=rope()),
        "qwen2": lambda: Qwen2Config(
            **SIZES, rope_parameters=rope("yarn", factor=2.0, original_max_position_embeddings=64)
        ),
        "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=rope()),
        "qwen3_own_head": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
        "gemma": lambda: GemmaConfig(**SIZES, head_dim=16, hidden_act="gelu_pytorch_tanh"),
        "gemma2": lambda: Gemma2Config(**gemma, final_logit_softcapping=5.0, attn_logit_softcapping=10.0),
        "gemma3": lambda: Gemma3TextConfig(
            **gemma | {"num_hidden_layers": 7},
            rope_parameters={"full_attention": full, "sliding_attention": local},
        ),
        "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2, sliding_window=None),
        "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **moe, shared_expert_intermediate_size=48, norm_topk_prob=False),
        "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **moe, head_dim=16, norm_topk_prob=True),
        "phi3": lambda: Phi3Config(**SIZES, rope_parameters=rope()),
        "phi3_short": lambda: Phi3Config(
            **SIZES | {"max_position_embeddings": 1024},
            original_max_position_embeddings=256,
            rope_parameters={"rope_theta": THETA, **LONG},
        ),
        "phi3_long": lambda: Phi3Config(  # one token is short, texts of two and more are long
            **SIZES,
            original_max_position_embeddings=1,
            rope_parameters={"rope_theta": THETA, "attention_factor": 1.2, **LONG},
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**ONE_KEY, rope_parameters=rope(partial_rotary_factor=0.5)),
        "gpt2": lambda: GPT2Config(n_embd=64, n_layer=4, n_head=8, n_positions=128, vocab_size=96),
    }[name]()


CUTS = {
    "dense": {},
    "uniform": {"mlp": (101,)},
    "rounded": {"mlp": (96,)},
    "heads": {"heads": (2,)},
    "uneven": {"mlp": (101, 77, 150, 50)},
    "uneven heads": {"heads": (4, 2, 1, 3)},
    "widths and heads": {"mlp": (101, 77, 150, 50), "heads": (4, 2, 1, 3)},
    "layers": {"layers": (0, 2, 3)},
    "all": {"mlp": (101, 77, 150, 50), "heads": (4, 2, 1, 3), "layers": (0, 2, 3)},
    "channels": {"channels": (48,)},
    "experts": {"experts": (4,)},
}
PER_LAYER = ("llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3", "phi3")
CASES = [
    *[(name, cut) for name in PER_LAYER for cut in CUTS if cut not in ("all", "channels", "experts")],
    *[
        (name, cut)
        for name in ("gemma", "gemma2", "gemma3")
        for cut in ("dense", "uniform", "rounded", "heads", "layers")
    ],
    *[(name, cut) for name in ("gpt_neox", "gpt2") for cut in ("dense", "uniform", "rounded", "layers")],
    *[(name, cut) for name in ("phi3_short", "phi3_long") for cut in ("dense", "uniform")],
    *[(name, cut) for name in ("mixtral", "qwen2_moe", "qwen3_moe") for cut in ("dense", "experts", "layers")],
    *[("qwen3_own_head", cut) for cut in ("uniform", "heads", "layers", "channels")],
    ("llama", "all"),
    ("mixtral", "heads"),
    ("qwen3_moe", "heads"),
    *[(name, "channels") for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")],
]
PADDED = [(name, "uneven") for name in ("gemma2", "gemma3", "gpt2", "gpt_neox")]


def built(name, cut):
    """Returns a random model of a family after a cut, and the plan."""
    if "GemmaForCausalLM" not in ARCHITECTURES:  # GGUF has it, the tables need not
        register(replace(ARCHITECTURES.get("LlamaForCausalLM"), model_class="GemmaForCausalLM"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family(name)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    keep = {}
    for kind, counts in CUTS[cut].items():
        groups = find_groups(model, (kind,))
        if kind == "layers":
            keep[groups[0].name] = counts
            continue
        for index, group in enumerate(groups):
            keep[group.name] = range(counts[index % len(counts)])
    plan = hfprune.make_plan(model, keep=keep) if keep else None
    if plan is not None:
        hfprune.apply_plan(model, plan)
    return model, plan


PROMPTS = [[3, 9, 27, 5], [40, 8, 8, 21, 33, 4, 19], [11, 50]]


def expected(model, count=32):
    """Returns greedy tokens, the first logits, and how clear each token is, of every prompt, without a cache."""
    found = []
    for prompt in PROMPTS:
        ids, margins = torch.tensor([prompt]), []
        with torch.no_grad():
            first = model(input_ids=ids).logits[0, -1]
            for _ in range(count):
                logits = model(input_ids=ids).logits[0, -1]
                best, second = logits.topk(2).values
                margins.append(float((best - second) / logits.abs().max()))
                ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        tokens = ids[0, len(prompt) :].tolist()
        found.append({"tokens": tokens, "logits": first.tolist(), "margins": margins})
    return found


def run(jobs):
    """Runs jobs in the engine."""
    command = [PYTHON, str(ENGINE)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(family, cut) -> architecture, what the model computes, and what the engine computes; one process for all."""
    root, jobs, found = tmp_path_factory.mktemp("gguf"), [], {}
    for name, cut in [*CASES, *PADDED]:
        model, plan = built(name, cut)
        path = root / f"{name} {cut}.gguf"
        if (name, cut) in PADDED:
            export_model(model, None, plan, root / f"{name} {cut}", layout="padded")
            model = hfprune.load(root / f"{name} {cut}")
        saved = export_gguf(model, None, path, gguf_type="f32")
        jobs.append({"do": "generate", "model": str(path), "prompts": PROMPTS, "tokens": 32})
        found[name, cut] = (saved["architecture"], expected(model))
    return {key: (*found[key], answer) for key, answer in zip(found, run(jobs), strict=True)}


@pytest.mark.parametrize(("name", "cut"), [*CASES, *PADDED])
def test_greedy_tokens_and_logits(answers, name, cut):
    architecture, own, theirs = answers[name, cut]
    assert "error" not in theirs, theirs
    # its GELU is a table in half precision
    limit = 2e-3 if architecture in ("gpt2", "gptneox", "gemma", "gemma2", "gemma3") else 2e-5
    for one, other in zip(own, theirs, strict=True):
        reference = np.array(one["logits"])
        assert np.abs(np.array(other["logits"]) - reference).max() <= limit * np.abs(reference).max()
        differing = [i for i, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=True)) if a != b]
        assert not differing or one["margins"][differing[0]] <= limit  # two tokens are equally likely


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_the_tokenizer_cuts_them(kind, tmp_path):
    tokenizer = trained(kind)
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer) + 3})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    # converted Unigram models strip line breaks at the end, llama.cpp strips spaces there
    texts = [text.rstrip() for text in TEXTS] if kind == "unigram" else TEXTS
    (found,) = run([{"do": "tokenize", "model": str(tmp_path / "m.gguf"), "texts": texts}])
    for text, ids in zip(texts, found, strict=True):
        assert ids == tokenizer(text)["input_ids"], text


def test_the_embedded_model_with_widths_per_layer(tmp_path):
    """Its tokens in float32, and its own tokenizer; eight bits load as well."""
    from hfprune.allocation import GlobalRank
    from hfprune.criteria import ActivationNorm
    from hfprune.io.load import load_causal_lm

    model, tokenizer = load_causal_lm("smollm2-135m", dtype="float32"), smollm2()
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of France is", "def add(a, b):\n", "Once upon a")]
    scores = hfprune.score(model, [torch.tensor([prompt]) for prompt in prompts], ActivationNorm())
    plan = hfprune.make_plan(model, scores, budget=0.2, allocation=GlobalRank())
    hfprune.apply_plan(model, plan)
    for kind in ("f32", "q8_0"):
        assert export_gguf(model, tokenizer, tmp_path / f"{kind}.gguf", gguf_type=kind)["architecture"] == "deci"
    jobs = [
        {"do": "generate", "model": str(tmp_path / f"{k}.gguf"), "prompts": prompts, "tokens": 32}
        for k in ("f32", "q8_0")
    ]
    found, eight, cut = run([*jobs, {"do": "tokenize", "model": str(tmp_path / "f32.gguf"), "texts": TEXTS}])
    assert cut == [tokenizer(text)["input_ids"] for text in TEXTS]
    for prompt, answer, rounded in zip(prompts, found, eight, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
        assert answer["tokens"] == made[0, len(prompt) :].tolist()
        one, other = np.array(answer["logits"]), np.array(rounded["logits"])
        assert np.abs(one - other).max() < 0.1 * np.abs(one).max()


# the stock converter


def read(path):
    import gguf

    reader = gguf.GGUFReader(path)
    data = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return data, {t.name: (t.tensor_type.name, tuple(t.shape), bytes(t.data)) for t in reader.tensors}


def converted(folder, path, kind):
    stubs = path.parent / "stubs"
    stubs.mkdir()  # imported before the converter finds that there is no tokenizer.model
    (stubs / "sentencepiece.py").write_text("class SentencePieceProcessor: ...\n")
    environment = {**os.environ, "PYTHONPATH": f"{Path(CONVERTER).parent / 'gguf-py'}{os.pathsep}{stubs}"}
    command = [sys.executable, CONVERTER, str(folder), "--outfile", str(path), "--outtype", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


DESCRIPTIVE = ("hfprune.", "general.")
"""Metadata of the file that does not change what the engine computes; each program writes its own."""

STOCK = {
    "llama": "f16",
    "llama3": "q8_0",
    "llama_bias": "f16",
    "mistral": "f32",
    "qwen3": "bf16",
    "gemma3": "f16",
}  # Phi-3's tokenizer must be a SentencePiece model there, GPT-2's width four times the hidden size


@pytest.mark.skipif(
    not CONVERTER, reason="HFPRUNE_LLAMA_CPP_CONVERTER names no convert_hf_to_gguf.py: make serve-llama-cpp test-serve"
)
@pytest.mark.parametrize("name", STOCK)
def test_a_uniform_model_is_what_the_stock_converter_writes(name, tmp_path):
    model, plan = built(name, "uniform")
    tokenizer = smollm2()
    model.resize_token_embeddings(len(tokenizer))
    export_model(model, tokenizer, plan, tmp_path / "model")
    model = hfprune.load(tmp_path / "model")
    export_gguf(model, tokenizer, tmp_path / "own.gguf", gguf_type=STOCK[name])
    converted(tmp_path / "model", tmp_path / "stock.gguf", STOCK[name])
    (own, weights), (stock, others) = read(tmp_path / "own.gguf"), read(tmp_path / "stock.gguf")
    assert weights.keys() == others.keys()
    for tensor, (kind, shape, data) in others.items():
        assert weights[tensor][:2] == (kind, shape), tensor
        if tensor.startswith("rope_"):
            np.testing.assert_allclose(np.frombuffer(weights[tensor][2], "f4"), np.frombuffer(data, "f4"), rtol=1e-6)
        else:
            assert weights[tensor][2] == data, tensor
    for key, value in stock.items():
        if not key.startswith(DESCRIPTIVE) or key == "general.architecture":
            assert own[key] == value, key
