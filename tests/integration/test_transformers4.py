"""Saved folders say what they say in the forms of transformers 5 and 4."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

import hfprune
from hfprune.io.save import export_model, export_sharded
from hfprune.models import config_values, find_groups
from hfprune.models.transformers4 import both_forms, generic_tokenizer, write_both_forms
from hfprune.plan import PruningPlan
from tests.helpers.models import COMMON, GATED, OWN_HEAD_DIM, configs, mixtures, tiny_tokenizer
from tests.helpers.plans import mlp_plan

THETA = 77.0
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 2.2]}


def rope(kind="default", **values):
    return {"rope_type": kind, "rope_theta": THETA, **values}


def config(name):
    """Returns the tiny config ``name`` with a base that no class has by default."""
    own = {
        "linear": lambda: LlamaConfig(**GATED, rope_parameters=rope("linear", factor=2.0)),
        "dynamic": lambda: LlamaConfig(**GATED, rope_parameters=rope("dynamic", factor=2.0)),
        "llama3": lambda: LlamaConfig(**GATED, rope_parameters=rope("llama3", **LLAMA3)),
        "yarn": lambda: Qwen2Config(
            **GATED, rope_parameters=rope("yarn", factor=2.0, original_max_position_embeddings=32)
        ),
        "longrope": lambda: Phi3Config(
            **GATED | {"max_position_embeddings": 128},
            original_max_position_embeddings=32,
            rope_parameters=rope("longrope", **LONG),
        ),
        "phi3_partial": lambda: Phi3Config(
            **GATED | {"hidden_size": 32}, rope_parameters=rope(partial_rotary_factor=0.5)
        ),
        "gemma3_linear": lambda: Gemma3TextConfig(
            **OWN_HEAD_DIM | {"num_hidden_layers": 6},
            sliding_window=8,
            rope_parameters={
                "full_attention": rope("linear", factor=8.0),
                "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
            },
        ),
        "neox_half": lambda: GPTNeoXConfig(
            **COMMON, intermediate_size=24, rope_parameters=rope(partial_rotary_factor=0.5)
        ),
    }
    if name in own:
        return own[name]()
    found = (configs() | mixtures())[name]
    if "rope_theta" in (getattr(found, "rope_parameters", None) or {}):
        found.rope_parameters["rope_theta"] = THETA
    return found


EXPECTED = {
    "llama": {"rope_theta": THETA},
    "linear": {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_theta": THETA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "yarn": {
        "rope_theta": THETA,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    },
    "longrope": {"rope_theta": THETA, "rope_scaling": {"type": "longrope", **LONG}},
    "phi3_partial": {"rope_theta": THETA, "partial_rotary_factor": 0.5},
    "gemma3_linear": {
        "rope_theta": THETA,
        "rope_local_base_freq": 55.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    },
    "neox_half": {"rope_theta": THETA, "rotary_pct": 0.5, "rotary_emb_base": THETA},
    "gpt2": {"n_ctx": 64},
    "qwen3_moe": {"rope_theta": THETA, "num_experts": 6},
    "mixtral": {"rope_theta": THETA},
}


def rotary(config):
    """Returns the rotary settings without the old name of their type, which transformers 5 keeps beside the new one."""
    settings = config.to_dict()["rope_parameters"]
    nested = settings if "full_attention" in settings else {"": settings}
    return {layer: {k: v for k, v in rope.items() if k != "type"} for layer, rope in nested.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_config_json_has_both_forms_and_reads_the_same(name, tmp_path):
    config(name).save_pretrained(tmp_path)
    before, plain = AutoConfig.from_pretrained(tmp_path), json.loads((tmp_path / "config.json").read_text())
    write_both_forms(tmp_path)
    written, after = json.loads((tmp_path / "config.json").read_text()), AutoConfig.from_pretrained(tmp_path)
    assert {key: written.get(key) for key in EXPECTED[name]} == EXPECTED[name]
    assert ("rope_scaling" in written) == ("rope_scaling" in EXPECTED[name])
    assert {k: v for k, v in plain.items() if v is not None or k != "head_dim"}.items() <= written.items()
    if "rope_parameters" in plain:
        assert rotary(before) == rotary(after)
    after.save_pretrained(tmp_path)  # a folder of an export that is exported again
    write_both_forms(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert {key: again.get(key) for key in EXPECTED[name]} == EXPECTED[name]


def test_layers_that_no_longer_repeat_have_no_pattern():
    """Gemma 3 without one of its layers: releases that know a pattern alone cannot be told."""
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    found = both_forms({"model_type": "gemma3_text", "layer_types": kinds, "_sliding_window_pattern": 6})
    assert "sliding_window_pattern" not in found


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer", "bitmask", "sharded"])
def test_every_export_writes_both_forms(layout, tmp_path):
    folder = tmp_path / "model"
    export("llama", folder, layout)
    written = json.loads((folder / "config.json").read_text())
    assert (written["rope_theta"], written["torch_dtype"], written["dtype"]) == (THETA, "float32", "float32")
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert hfprune.load(folder).config.rope_parameters["rope_theta"] == THETA


def test_tokenizers_read_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(tmp_path)
    before, text = AutoTokenizer.from_pretrained(tmp_path), "the assert <x> while"
    write_both_forms(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert type(after) is type(before)
    assert after.extra_special_tokens == before.extra_special_tokens == ["<x>"]
    assert after(text).input_ids == before(text).input_ids


def test_a_tokenizer_class_of_both_generations_is_left_alone():
    found = {"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert generic_tokenizer(found) == found


def export(name, folder, layout):
    """Exports the tiny model ``name`` with two thirds of its neurons (or experts), and returns it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if layout == "per_layer":
        plan = mlp_plan(model)
    else:
        units = ("experts",) if name in mixtures() else ("mlp",)
        groups = find_groups(model, units)
        keep = {g.name: tuple(range(g.num_units * 2 // 3)) for g in groups}
        config_keys = config_values(model, groups, keep)
        plan = PruningPlan(model_class=type(model).__name__, groups=groups, keep=keep, config=config_keys)
    hfprune.apply_plan(model, plan)
    if layout == "sharded":
        export_sharded(model, tiny_tokenizer(), plan, folder, writer=True)
        return model
    if layout == "bitmask":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter[:, 1:] = 0
    export_model(model, tiny_tokenizer(), plan, folder, layout=layout)
    return model


# ---- releases of transformers 4, where some are installed -------------------------------------------------------------

OLD = [path for path in os.environ.get("HFPRUNE_TRANSFORMERS4", "").split(os.pathsep) if path]
IDS = list(range(3, 27))
SINCE = {  # the releases of transformers 4 that read a class or its settings as transformers 5 does
    "llama": (4, 38),
    "linear": (4, 38),
    "dynamic": (4, 38),
    "llama3": (4, 43),
    "mistral": (4, 38),
    "mixtral": (4, 38),
    "qwen2": (4, 38),
    "yarn": (4, 51),
    "qwen2_moe": (4, 42),
    "qwen3": (4, 51),
    "qwen3_moe": (4, 51),
    "gemma2": (4, 42),
    "gemma3": (4, 51),
    "gemma3_linear": (4, 51),
    "phi3": (4, 42),
    "phi3_partial": (4, 51),
    "longrope": (4, 46),
    "opt": (4, 38),
    "gpt2": (4, 38),
    "neox_half": (4, 38),
}
_READ = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
ids, version = torch.tensor([json.loads(sys.argv[2])]), transformers.__version__
found = {}
for folder in map(Path, json.loads(sys.argv[1])):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    own = load_file(folder / "logits" / "logits.safetensors")["logits"]
    found[folder.name] = float((logits - own).abs().max() / own.abs().max())
tokens = AutoTokenizer.from_pretrained(folder)("the assert while").input_ids if sys.argv[3] == "1" else None
print(json.dumps({"version": version, "differences": found, "tokens": tokens}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of one export per class, with the logits of the model in memory."""
    root = tmp_path_factory.mktemp("exports")
    for name in SINCE:
        for layout in ("uniform", "padded") if name == "llama" else ("uniform",):
            folder = root / (name if layout == "uniform" else f"{name}_{layout}")
            model = export(name, folder, layout)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([IDS])).logits
            (folder / "logits").mkdir()
            save_file({"logits": logits}, folder / "logits" / "logits.safetensors")
    return root


@pytest.mark.slow
@pytest.mark.skipif(not OLD, reason="HFPRUNE_TRANSFORMERS4 names no transformers 4: make test-transformers4")
@pytest.mark.parametrize("path", OLD or ["none"], ids=lambda path: Path(path).name)
def test_transformers_4_gives_the_same_logits(path, folders):
    """Every class that the release has, from the oldest one on."""
    release = tuple(map(int, Path(path).name.split(".")[:2]))
    names = [folder for folder in sorted(folders.iterdir()) if SINCE[folder.name.removesuffix("_padded")] <= release]
    reads_tokenizers = release >= (4, 45)  # older ones come with tokenizers that cannot read today's tokenizer.json
    arguments = [json.dumps([str(name) for name in names]), json.dumps(IDS), str(int(reads_tokenizers))]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", _READ, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["version"] == Path(path).name
    assert len(found["differences"]) == len(names) > 0
    assert {name: value for name, value in found["differences"].items() if value > 1e-5} == {}
    if reads_tokenizers:
        assert found["tokens"] == tiny_tokenizer()("the assert while").input_ids
