"""Sparse models on disk without their zeros: bits, files, loading, and what is damaged."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfprune
from hfprune.cli import main
from hfprune.errors import ConfigError
from hfprune.export import export_model
from hfprune.layouts.bitmask import INDEX_FILE, is_worth_it, pack, stored_tensors, unpack
from hfprune.plan import PruningPlan
from tests.models import save_tiny, tiny, token_ids

SMALL = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=2", "--data.eval_window=16"]
WANDA = ["--method=wanda", "--sparsity=2:4"]
QUIET = ["--latency=false", "--trainer.enable_progress_bar=false"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def sparse(model, share=0.5):
    """Zeroes a share of every weight of the layers' projections."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and name.endswith("weight"):
                parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return model


def written(model, folder, **kwargs):
    plan = PruningPlan(model_class=type(model).__name__, groups=(), keep={}, config={})
    return export_model(model, None, plan, folder, layout="bitmask", **kwargs)


@pytest.fixture
def folder(tmp_path):
    model = sparse(tiny(dtype=torch.float32))
    written(model, tmp_path / "m")
    return tmp_path / "m", model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1), (7, 16)])
def test_packed_and_unpacked_is_the_same(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    for dense in (
        weight,
        weight.masked_fill(torch.rand(shape, generator=generator) < 0.6, 0),
        torch.zeros_like(weight),
    ):
        values, bits = pack(dense)
        assert len(values) == int((dense != 0).sum())
        assert len(bits) == -(-dense.numel() // 8)
        by_hand = [int(bits[i // 8]) >> (i % 8) & 1 for i in range(dense.numel())]
        assert by_hand == [int(v != 0) for v in dense.flatten().tolist()]
        assert torch.equal(unpack(values, bits, list(shape), "w"), dense)


def test_what_does_not_belong_together_is_damaged():
    values, bits = pack(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]))
    for bad in ((values[:2], bits, [2, 3]), (values, bits, [2, 2]), (values, bits[:0], [2, 3]), (values, bits, [3, 9])):
        with pytest.raises(ConfigError, match="w are damaged"):
            unpack(*bad, "w")


def test_only_matrices_with_enough_zeros_are_packed():
    assert is_worth_it(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert not is_worth_it(torch.ones(4, 4))
    assert not is_worth_it(torch.zeros(4))
    few = torch.ones(8, 8, dtype=torch.bfloat16)
    few.view(-1)[:4] = 0  # 8 bytes saved, 8 bytes of bits
    assert not is_worth_it(few)
    few.view(-1)[4] = 0
    assert is_worth_it(few)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_untied_bias"])
def test_loads_to_the_last_bit(name, tmp_path):
    model = sparse(tiny(name, dtype=torch.float32))
    if name == "gpt2":
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[:, ::2] = 0
    saved = written(model, tmp_path / "m")
    assert saved["layout"] == "bitmask"
    assert saved["max_logit_difference_after_reload"] == 0
    assert saved["bytes"] == sum(f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors"))
    for found in (hfprune.load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")):
        assert type(found) is type(model)
        assert type(found.config) is type(model.config)
        for key, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[key], value)
        found.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    half = hfprune.load(tmp_path / "m", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_several_files(tmp_path):
    model = sparse(tiny(dtype=torch.float32))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    hfprune.layouts.LAYOUTS.get("bitmask").compress(tmp_path)
    assert not list(tmp_path.glob("model*"))
    assert {name for name, _ in stored_tensors(str(tmp_path))} == set(model.state_dict()) - {"lm_head.weight"}
    assert torch.equal(logits(hfprune.load(tmp_path)), logits(model))


def test_half_the_weights_take_a_bit_more_than_half_the_space(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = sparse(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    written(model, tmp_path / "m")
    model.save_pretrained(tmp_path / "dense")
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("m", "dense")]
    assert 0.55 < sizes[0] / sizes[1] < 0.6  # 1/2 and one bit in sixteen; the embeddings are as they were


def test_software_without_hfprune_stops(folder):
    path, _ = folder
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(path)!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "hfprune_bitmask" in ran.stderr
    code = f"import hfprune.auto; {code}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    with pytest.raises(OSError, match="model.safetensors"):
        LlamaForCausalLM.from_pretrained(path)


def test_damaged_folders_are_errors(folder, tmp_path):
    path, _ = folder
    (file,) = path.glob("bitmask-*.safetensors")
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith(".bits"))

    def broken(change):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(path, tmp_path / "b")
        change(tmp_path / "b")
        with pytest.raises(ConfigError) as error:
            hfprune.load(tmp_path / "b")
        return str(error.value)

    other = tensors | {key: tensors[key] ^ 1}
    assert "damaged" in broken(lambda b: save_file(other, b / file.name))
    less = {name: t for name, t in tensors.items() if name != key}
    assert "lack" in broken(lambda b: save_file(less, b / file.name))
    assert "damaged" in broken(lambda b: (b / file.name).write_bytes(file.read_bytes()[:-100]))
    assert f"no {file.name}" in broken(lambda b: (b / file.name).unlink())
    assert f"no {INDEX_FILE}" in broken(lambda b: (b / INDEX_FILE).unlink())
    config = json.loads((path / "config.json").read_text())
    config["hfprune"]["version"] = 99
    assert "another version" in broken(lambda b: (b / "config.json").write_text(json.dumps(config)))


def test_a_model_without_zeros_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no matrix of this model has enough"):
        written(tiny(dtype=torch.float32), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_line_writes_it_and_turns_it_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = save_tiny(tmp_path / "dense")
    assert main(["prune", f"--model.path={dense}", *SMALL, *QUIET, *WANDA, "--output_dir=out"]) == 0
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert main(["export", "--model.path=out/model", "--layout=bitmask", "--output_dir=small"]) == 0
    assert torch.equal(logits(hfprune.load("small")), logits(model))
    assert main(["export", "--model.path=small", "--layout=uniform", "--output_dir=plain"]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("plain")), logits(model))
    assert main(["evaluate", "--model.path=small", "--data.eval_windows=1", "--data.eval_window=16", *QUIET[:1]]) == 0
