"""``per_layer`` folders in vLLM, with the plugin of the package."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune.io.save import export_model
from hfprune.publishing.engine_check import check_engine, greedy
from hfprune.vllm_plugin import FAMILIES, refusal
from tests.helpers.served import LARGE, PROMPTS, cut, export, run_script, servable

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("HFPRUNE_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="HFPRUNE_VLLM_PYTHON names no python with vLLM: make serve-vllm")
WIDTHS = (33, 77, 50, 96)
HEADS = (1, 2, 1, 2)
_GENERATE = """
import json, os, sys
import vllm
from vllm import LLM, SamplingParams
folders, prompts, options = json.loads(sys.argv[1])
found = {}
for folder in folders:
    try:
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
                  max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=2**24, **options)
        settings = SamplingParams(temperature=0, max_tokens=32, min_tokens=0, ignore_eos=True, detokenize=False)
        made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        found[folder] = [list(one.outputs[0].token_ids) for one in made]
        del llm
        print(folder, file=sys.stderr, flush=True)
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
print(json.dumps({"version": vllm.__version__, "found": found}), flush=True)
os._exit(0)  # an engine in this process may keep it alive
"""


def generated(folders, *, plugins=None, **options):
    """Returns the greedy tokens of vLLM for each folder, or the error of one; ``plugins`` are the allowed ones."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    environment |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
    answer = run_script(PYTHON, _GENERATE, [list(map(str, folders)), PROMPTS, options], path=ROOT, **environment)
    return {Path(folder).name: tokens for folder, tokens in answer["found"].items()}


def cases():
    """Name -> config, and what is left of its layers."""
    found = {}
    for name, config in servable().items():
        found[name] = (config, {"widths": WIDTHS})
        if FAMILIES[_CLASSES[name]].heads:
            found[f"{name}_heads"] = (config, {"widths": WIDTHS, "heads": HEADS})
    found["llama_all"] = (servable()["llama"], {"widths": WIDTHS, "heads": HEADS, "without": (1,)})
    return found


_CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_tokens_as_hfprune(tmp_path):
    exports = {
        name: export(config, tmp_path / name, new_tokens=32, **units) for name, (config, units) in cases().items()
    }
    found = generated([export.folder for export in exports.values()])
    assert found == {name: export.tokens for name, export in exports.items()}


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nemotron_nas_without_the_plugin(tmp_path):
    config = LlamaConfig(**LARGE | {"head_dim": 32, "hidden_size": 128, "intermediate_size": 768})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plan = cut(model, widths=(256, 768, 512, 256))
    export_model(model, None, plan, tmp_path / "m", layout="nemotron_nas")
    expected = [greedy(model, prompt, 32).argmax(-1).tolist() for prompt in PROMPTS]
    found = generated([tmp_path / "m"], trust_remote_code=True, plugins="")
    assert found == {"m": expected}


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_compares_the_result_in_vllm(tmp_path):
    model = AutoModelForCausalLM.from_config(servable()["qwen3"]).eval()
    plan = cut(model, widths=WIDTHS, heads=HEADS)
    export_model(model, None, plan, tmp_path / "m", layout="per_layer")
    found = check_engine(tmp_path / "m", model, "vllm")
    assert found.version.startswith("0.")
    assert found.difference < 0.001


def test_what_vllm_cannot_build_is_refused_by_name():
    assert refusal("GPT2LMHeadModel", {}).startswith("the plugin serves Gemma3ForCausalLM")
    assert refusal("Phi3ForCausalLM", {"0": {"intermediate_size": 8}, "1": {"num_key_value_heads": 2}})
    assert not refusal("Phi3ForCausalLM", {"0": {"intermediate_size": 8}})
    assert "without attention or MLP" in refusal("LlamaForCausalLM", {}, partial=True)
    assert "differ in num_local_experts" in refusal("LlamaForCausalLM", {"0": {"num_local_experts": 8}})


def test_the_entry_point_names_the_plugin():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    points = config["options.entry_points"]["vllm.general_plugins"].split("=")
    assert [point.strip() for point in points] == ["hfprune", "hfprune.vllm_plugin:register"]


def test_the_plugin_imports_nothing_at_start():
    code = "import sys, hfprune.vllm_plugin; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
