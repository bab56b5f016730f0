"""Models that are not what they seem: each works, or is refused in one line before anything is run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)

import hfprune
from hfprune.cli import main
from hfprune.evaluation.size_and_speed import measure_size
from hfprune.io.load import check_model, load_causal_lm, load_config, meta_model
from hfprune.modules import PruningModule
from hfprune.utils.errors import ConfigError
from tests.helpers.models import GATED, OWN_HEAD_DIM, save_tiny, tiny, tiny_tokenizer
from tests.helpers.runs import EVALUATE_FLAGS, TINY_FLAGS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n"

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "dense", "llama_untied_bias")


@pytest.fixture
def folder(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(dense, tmp_path / "m"))


def set_config(folder, name="config.json", **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def renamed(name):
    return lambda folder: change_weights(folder, lambda tensors: {name(k): v for k, v in tensors.items()})


def without(part):
    return lambda folder: change_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if part not in k})


def written(file, text):
    return lambda folder: (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def as_pickle(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return change


def checkpoint(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, "state_dict": {}}, folder / "pytorch_model.bin")


def shards(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors").unlink()
    min(folder.glob("model-0*.safetensors")).unlink()


def adapter(folder):
    LoraConfig(r=2, target_modules=["up_proj"], base_model_name_or_path="base").save_pretrained(folder)
    save_file(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 16)},
        folder / "adapter_model.safetensors",
    )


def adapter_alone(folder):
    adapter(folder)
    (folder / "config.json").unlink()


def multimodal(folder):
    text = OWN_HEAD_DIM | {"sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


KINDS = {
    "missing_head": (without("lm_head"), "lack 1 of the tensors that LlamaForCausalLM has by config.json: lm_head.w"),
    "missing_layer": (without("layers.1."), "lack 16 of the tensors"),
    "missing_everything": (without(""), "lack"),
    "unexpected": (lambda f: set_config(f, mlp_bias=False), "hold 9 tensors that LlamaForCausalLM does not have"),
    "fewer_layers": (lambda f: set_config(f, num_hidden_layers=2), "hold 16 tensors"),
    "other_shape": (
        lambda f: set_config(f, intermediate_size=20),
        "has the shape [16, 24] in the weight files and [16, 20] by config",
    ),
    "other_vocabulary": (
        lambda f: set_config(f, vocab_size=64),
        "has the shape [61, 16] in the weight files and [64, 16]",
    ),
    "wrapped_ddp": (renamed(lambda k: f"module.{k}"), "contain 'module.'"),
    "wrapped_compile": (renamed(lambda k: f"_orig_mod.{k}"), "torch.compile"),
    "wrapped_peft": (renamed(lambda k: f"base_model.model.{k}"), "PEFT"),
    "wrapped_fsdp": (renamed(lambda k: k.replace(".mlp.", "._fsdp_wrapped_module.mlp.")), "FSDP"),
    "wrapped_text": (renamed(lambda k: k.replace("model.", "model.language_model.", 1)), "a multimodal class"),
    "unmerged": (renamed(lambda k: k.replace("up_proj.", "up_proj.base_layer.")), "merge_and_unload"),
    "pointer": (written("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "pointer_bin": (as_pickle(POINTER.encode()), "pytorch_model.bin is a Git LFS pointer"),
    "pointer_tokenizer": (written("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "pointer_sentencepiece": (written("tokenizer.model", POINTER), "tokenizer.model is a Git LFS pointer"),
    "pointer_config": (written("config.json", POINTER), "config.json is a Git LFS pointer"),
    "cut": (cut("model.safetensors"), "model.safetensors is damaged or cut off"),
    "cut_config": (cut("config.json"), "config.json is not valid JSON"),
    "cut_generation": (cut("generation_config.json"), "generation_config.json is not valid JSON"),
    "cut_tokenizer": (cut("tokenizer.json"), "tokenizer.json is not valid JSON"),
    "empty": (written("model.safetensors", ""), "model.safetensors is empty"),
    "zeros": (written("model.safetensors", b"\0" * 5000), "contains only zeros"),
    "html": (written("model.safetensors", "<html>Not found</html>" * 9), "model.safetensors is damaged"),
    "html_bin": (as_pickle(b"<html>Not found</html>"), "pytorch_model.bin is damaged"),
    "cut_bin": (as_pickle(b"PK\x03\x04" + bytes(900)), "pytorch_model.bin is damaged"),
    "checkpoint": (checkpoint, "not a state dict"),
    "lost_shard": (shards, "lacks 1 of the "),
    "list_config": (written("config.json", "[1]"), "holds a list where an object"),
    "tied": (lambda f: set_config(f, tie_word_embeddings=True), "ties the output head to the embeddings"),
    "architectures": (lambda f: set_config(f, architectures=-0.5), "architectures -0.5 in config.json is not a list"),
    "tokenizer_length": (lambda f: set_config(f, "tokenizer_config.json", model_max_length=[1]), "no usable tokenizer"),
    "list_tokenizer": (written("tokenizer_config.json", "[]"), "holds a list where an object"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no_vocabulary": (lambda f: (f / "tokenizer.json").unlink(), "no usable tokenizer"),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "x.gguf"), "it has x.gguf"),
    "adapter": (adapter, "holds a model and an adapter"),
    "adapter_alone": (adapter_alone, "holds an adapter, not a model"),
    "multimodal": (multimodal, "is a multimodal model (Gemma3Config)"),
    "pad_outside": (lambda f: set_config(f, pad_token_id=61), "pad_token_id 61 in config.json is outside"),
    "attention": (lambda f: set_config(f, attn_implementation="flash_attention_2"), "that is not installed"),
    "dtype": (lambda f: set_config(f, dtype="int8"), "dtype int8 in config.json is not supported"),
    "dtype_unknown": (lambda f: set_config(f, dtype="banana"), "config"),
    "quantised": (lambda f: set_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised"),
    "heads": (lambda f: set_config(f, num_key_value_heads=3), "3"),
    "activation": (lambda f: set_config(f, hidden_act="banana"), "banana"),
    "code": (lambda f: set_config(f, model_type="own", auto_map={"AutoConfig": "c.C"}), "custom code"),
    "tokens": (lambda f: tiny_tokenizer(90).save_pretrained(f), "resize_token_embeddings"),
}


def one_line(capsys, code):
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(err) == 1, err
    assert "Traceback" not in err[0]
    assert not Path("out").exists()
    return err[0]


@pytest.mark.parametrize("kind", KINDS)
def test_prune_refuses_in_one_line(folder, capsys, kind):
    change, expected = KINDS[kind]
    change(folder)
    capsys.readouterr()
    code = main(["prune", f"--model.path={folder}", "--output_dir=out", "--pruning_ratio=0.2", *TINY_FLAGS])
    assert expected in one_line(capsys, code)


@pytest.mark.parametrize("kind", ["missing_layer", "pointer", "adapter", "multimodal", "pad_outside", "no_weights"])
@pytest.mark.parametrize("command", ["fit", "evaluate", "dense", "sweep"])
def test_every_command_refuses(dense, folder, capsys, kind, command):
    change, expected = KINDS[kind]
    change(folder)
    capsys.readouterr()
    flags = [] if command in ("evaluate", "dense") else ["--output_dir=out"]
    model, name = (dense, f"--dense '{folder}'") if command == "dense" else (folder, f"--model.path '{folder}'")
    if command == "dense":
        flags.append(f"--dense={folder}")
    if command == "fit":
        flags += ["--pruning_ratio=0.2", "--data.recovery_sequences=8", "--data.validation_sequences=2"]
    Path("text.txt").write_text("The assert statement is a convenient way. " * 30)
    flags += EVALUATE_FLAGS if command in ("evaluate", "dense") else TINY_FLAGS
    code = main([command.replace("dense", "evaluate"), f"--model.path={model}", "--data.text=text.txt", *flags])
    line = one_line(capsys, code)
    assert expected in line
    assert name in line


@pytest.mark.parametrize("kind", ["missing_head", "other_shape", "wrapped_ddp", "cut", "adapter", "multimodal"])
def test_python_refuses(folder, kind):
    change, expected = KINDS[kind]
    change(folder)
    with pytest.raises(ConfigError) as error:
        PruningModule(str(folder))
    assert expected in str(error.value)
    with pytest.raises(ConfigError, match="folder="):
        hfprune.load(folder)


def test_export_refuses_weights_that_do_not_fit(folder, capsys):
    assert main(["prune", f"--model.path={folder}", "--output_dir=run", "--pruning_ratio=0.2", *TINY_FLAGS]) == 0
    without("lm_head")(Path("run/model"))
    capsys.readouterr()
    assert "lm_head.weight" in one_line(capsys, main(["export", "--model.path=run/model", "--output_dir=out"]))


def test_switches_work(folder):
    set_config(folder, return_dict=False, output_attentions=True, output_hidden_states=True, use_cache=False)
    set_config(folder, pad_token_id=-1, torch_dtype="float32")
    code = main(["prune", f"--model.path={folder}", "--output_dir=out", "--pruning_ratio=0.2", *TINY_FLAGS])
    assert code == 0
    assert hfprune.load("out/model")(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 61)


def test_buffers_of_older_versions_are_no_error(folder):
    change_weights(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    check_model(str(folder))
    load_causal_lm(str(folder))


@pytest.mark.parametrize("name", ["v_head.summary.weight", "mtp.0.proj.weight", "score.weight", "visual.patch.weight"])
def test_heads_beside_the_model_are_left_out_with_one_warning(folder, name):
    """TRL's value head, for example: predictions do not depend on it."""
    expected = load_causal_lm(str(folder)).state_dict()
    change_weights(folder, lambda t: t | {name: torch.ones(1, 16), f"{name}2": torch.ones(1)})
    check_model(str(folder))
    with pytest.warns(UserWarning, match=f"2 tensors in the weight files are not part of the model .{name}") as warned:
        found = load_causal_lm(str(folder)).state_dict()
    assert len(warned) == 1
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_heads_beside_a_model_saved_without_its_head(tmp_path):
    folder = Path(save_tiny(tmp_path / "m", "gpt2"))
    change_weights(
        folder, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()} | {"v_head.b": torch.ones(1)}
    )
    with pytest.warns(UserWarning, match="v_head.b"):
        load_causal_lm(str(folder))
    change_weights(folder, lambda t: t | {"h.0.attn.extra": torch.ones(1)})
    with pytest.raises(ConfigError, match="attn.extra"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.9.mlp.up_proj.weight", "model.norm.bias"])
def test_tensors_within_the_model_are_refused(folder, name):
    change_weights(folder, lambda t: t | {name: torch.ones(1)})
    with pytest.raises(ConfigError, match="does not have by config.json"):
        check_model(str(folder))


@pytest.mark.parametrize(
    "name",
    ["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.up_proj.base_layer.weight"],
)
def test_adapters_among_the_weights_are_refused(folder, name):
    change_weights(folder, lambda t: t | {name: torch.ones(1)})
    with pytest.raises(ConfigError, match="merge_and_unload"):
        check_model(str(folder))


def test_pickled_weights_work(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check_model(str(folder))
    old = torch.load(folder / "pytorch_model.bin")
    torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check_model(str(folder))


def test_no_code_is_asked_for(folder):
    set_config(folder, auto_map={"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"})
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization.T", None]}})
    )
    assert main(["prune", f"--model.path={folder}", "--output_dir=out", "--pruning_ratio=0.2", *TINY_FLAGS]) == 0
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads(Path("out/model", name).read_text())
    AutoModelForCausalLM.from_pretrained("out/model", trust_remote_code=True)


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "linear", "yarn"])
def test_size_with_scaled_rotary_embeddings(rope):
    scaling = {"rope_type": rope, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    scaling |= {"short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]} if rope == "longrope" else {}
    plain = measure_size(tiny("llama"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GATED, rope_parameters=scaling))
    assert measure_size(model).macs == plain.macs


def test_dynamic_rotary_embeddings_of_gpt_neox(folder, capsys):
    """They work; a rotary size of 2, for which transformers divides by zero, is refused by name."""
    save_tiny(folder, "gpt_neox")
    for share, out in ((1.0, "whole"), (0.5, "out")):
        scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": share}
        set_config(folder, rope_parameters=scaling)
        capsys.readouterr()
        code = main(["prune", f"--model.path={folder}", f"--output_dir={out}", "--pruning_ratio=0.1", *TINY_FLAGS])
    assert hfprune.load("whole/model").config.rope_parameters["rope_type"] == "dynamic"
    assert "cannot be built: ZeroDivisionError: division by zero" in one_line(capsys, code)


def test_generation_config_is_read_without_from_pretrained(folder):
    from hfprune.io.load import read_generation_config

    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[2, 3]).save_pretrained(folder)
    model = meta_model(str(folder))
    read_generation_config(model, str(folder))
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.6, [2, 3])


def test_local_path_that_does_not_exist_asks_no_hub(folder, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    Path("models").mkdir()
    folder.rename("models/llama-tiny")
    with pytest.raises(ConfigError, match="Did you mean 'models/llama-tiny'"):
        PruningModule("models/lama-tiny")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("./models/lama-tiny")


def test_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    Path("run.yaml").write_text("model: {path: ~/m}\noutput_dir: ~/out\npruning_ratio: 0.2\n")
    assert main(["prune", "--config=run.yaml", *TINY_FLAGS]) == 0
    assert not Path("~").exists()
    assert (
        main(
            [
                "evaluate",
                "--model.path=~/out/model",
                "--dense=~/m",
                "--output=~/e.json",
                "--data.text=builtin",
                *EVALUATE_FLAGS,
            ]
        )
        == 0
    )
    assert Path("e.json").exists()
    assert hfprune.load("~/out/model") is not None
    assert main(["prune", "--model.path=~nobody-here/m", "--output_dir=out2", "--pruning_ratio=0.2"]) == 2
