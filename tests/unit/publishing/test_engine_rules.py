"""Which engines load a folder, by rule, and the check in an engine that is installed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import hfprune
from hfprune.cli import main
from hfprune.io.save import export_model
from hfprune.publishing.engine_check import SCRIPTS, check_engine, python_variable
from hfprune.publishing.engine_rules import ENGINES, Facts, engine_line, facts_of, verdict, verdicts
from hfprune.publishing.inspection import inspect_folder, inspection_text
from hfprune.utils.errors import ConfigError, OutputError
from tests.helpers.models import configs, tiny_tokenizer
from tests.helpers.served import LARGE, cut

SINGLE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "opt")


def facts(name, layout="uniform", **changes):
    config = configs()[name]
    data = {**config.to_dict(), "architectures": [_class(config)], **changes}
    return facts_of(data, [24, 24, 24], layout=layout)


def _class(config):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]


def test_every_engine_has_a_verdict_with_a_reason():
    for engine in ENGINES:
        for name in SINGLE:
            for layout in ("uniform", "padded", "per_layer", "bitmask", "nemotron_nas", "plan"):
                state, note = verdict(engine, facts(name, layout))
                assert state in ("loads", "refused", "untested")
                assert note or state != "refused"


@pytest.mark.parametrize(
    ("engine", "name", "layout", "changes", "expected"),
    [
        ("llama_cpp", "llama", "uniform", {}, "loads"),
        ("llama_cpp", "gpt2", "uniform", {}, "refused"),
        ("llama_cpp", "opt", "uniform", {}, "untested"),
        ("vllm", "qwen2", "uniform", {"head_dim": 8}, "refused"),
        ("vllm", "qwen2", "uniform", {"head_dim": 4}, "loads"),
        ("vllm", "llama", "uniform", {"head_dim": 8}, "loads"),
        ("ctranslate2", "llama", "uniform", {"head_dim": 8}, "refused"),
        ("transformers", "opt", "per_layer", {}, "refused"),
        ("transformers", "opt", "per_layer", {"auto_map": {"AutoConfig": "x"}}, "loads"),
        ("vllm", "gpt2", "per_layer", {}, "refused"),
        ("vllm", "qwen2", "per_layer", {"per_layer_config": {"0": {"intermediate_size": 8}}}, "loads"),
        ("vllm", "llama", "per_layer", {"hfprune": {"without": {"attention": [1]}}}, "refused"),
        ("vllm", "qwen2", "per_layer", {"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "refused"),
    ],
)
def test_verdicts(engine, name, layout, changes, expected):
    assert verdict(engine, facts(name, layout, **changes))[0] == expected


def test_the_line_names_every_engine_once():
    line = engine_line(verdicts(facts("gpt2", "per_layer")))
    assert all(line.count(engine.title) == 1 for engine in ENGINES.values())
    assert line.startswith("loads in: hfprune; not in: ")
    assert verdicts(Facts(layout="nemotron_nas", model_class="DeciLMForCausalLM"))["hfprune"]["state"] == "refused"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A ``per_layer`` folder and its model in memory."""
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE))
    plan = cut(model, widths=(33, 77, 50, 96))
    export_model(model, tiny_tokenizer(), plan, root / "m", layout="per_layer")
    return root / "m", model


def test_a_folder_of_other_weights_fails_in_the_engine(exported, tmp_path):
    folder, model = exported
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= -3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match="is not what hfprune computes in transformers 5"):
        check_engine(tmp_path, model, "transformers")


def test_an_engine_that_is_not_installed_was_not_run(exported, monkeypatch, tmp_path):
    folder, model = exported
    found = check_engine(folder, model, "vllm") if "vllm" not in sys.modules else None
    assert found.version is None
    assert "HFPRUNE_VLLM_PYTHON names a Python that has it" in str(found)
    monkeypatch.setenv(python_variable("vllm"), str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"none' cannot be run: No such file"):
        check_engine(folder, model, "vllm")
    with pytest.raises(ConfigError, match="engine='mlx' cannot be run by hfprune. Known: transformers"):
        check_engine(folder, model, "mlx")


@pytest.mark.slow
def test_an_engine_that_fails_is_quoted(exported, tmp_path):
    folder, model = exported
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modeling_hfprune.py").unlink()
    with pytest.raises(OutputError, match="transformers cannot load .*modeling_hfprune.py"):
        check_engine(tmp_path, model, "transformers")


def test_export_says_what_loads_the_result_and_checks_one(exported, capsys, tmp_path, monkeypatch):
    folder, _ = exported
    monkeypatch.chdir(tmp_path)
    export = ["export", f"--model.path={folder}"]
    assert main([*export, "--layout=per_layer", "--output_dir=a", "--check=transformers"]) == 0
    out = capsys.readouterr().out
    assert "loads in: hfprune, transformers 5.23 (with trust_remote_code=True)" in out
    assert "greedy tokens equal to hfprune's (32, 32, 32) of 32" in out
    assert main([*export, "--layout=padded", "--output_dir=b", "--check=mlx"]) == 0
    assert "mlx-lm 0.32 was not run: by its rules, loads" in capsys.readouterr().out
    assert main([*export, "--layout=per_layer", "--output_dir=c", "--check=mlx"]) == 2
    assert "one size for all layers: use --layout padded" in capsys.readouterr().err
    assert main([*export, "--layout=per_layer", "--output_dir=c", "--check=nothing"]) == 2
    assert "'nothing' is not known. Known: transformers" in capsys.readouterr().err
    assert main([*export, "--layout=nemotron_nas", "--output_dir=c"]) == 2
    assert "multiples of 256" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_inspect_says_it_as_well(exported):
    found = inspect_folder(str(exported[0]))
    assert found["engines"]["vllm"] == {"engine": "vLLM 0.32", "state": "loads", "note": "with hfprune's plugin"}
    assert "  engines: loads in: hfprune, " in inspection_text(found)
    assert json.loads(json.dumps(found)) == found
    assert set(SCRIPTS) <= set(ENGINES)
    assert hfprune.load(exported[0]).config.num_hidden_layers == 4
