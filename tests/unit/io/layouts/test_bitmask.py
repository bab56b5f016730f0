"""Sparse models on disk without their zeros: bits, files and sizes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hfprune
from hfprune.cli import main
from hfprune.io.layouts import LAYOUTS
from hfprune.io.layouts.bitmask import INDEX_FILE, is_worth_it, pack, stored_tensors, unpack
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny
from tests.helpers.runs import TINY_FLAGS
from tests.helpers.sparse_models import logits, sparse, written

WANDA = ["--method=wanda", "--sparsity=2:4"]


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


def test_a_negative_zero_is_a_zero():
    weight = torch.tensor([[-0.0, 1.0], [float("nan"), 0.0]])
    values, bits = pack(weight)
    assert len(values) == 2
    found = unpack(values, bits, [2, 2], "w")
    assert not found.signbit().any()
    assert torch.equal(found.nan_to_num(9.0), weight.nan_to_num(9.0))


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
    LAYOUTS.get("bitmask").compress(tmp_path)
    assert not list(tmp_path.glob("model*"))
    with stored_tensors(str(tmp_path)) as tensors:
        assert set(tensors) == set(model.state_dict()) - {"lm_head.weight"}
        for name, stored in tensors.items():
            assert torch.equal(stored[...], model.state_dict()[name])
            assert stored.get_shape() == list(model.state_dict()[name].shape)
    assert torch.equal(logits(hfprune.load(tmp_path)), logits(model))


def test_files_are_no_larger_than_asked(tmp_path):
    model = sparse(tiny(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    LAYOUTS.get("bitmask").compress(tmp_path, file_bytes=4096)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == json.loads((tmp_path / INDEX_FILE).read_text())["files"]
    assert not list(tmp_path.glob("part-*"))
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


def test_a_model_without_zeros_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no matrix of this model has enough"):
        written(tiny(dtype=torch.float32), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_line_writes_it_and_turns_it_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = save_tiny(tmp_path / "dense")
    assert main(["prune", f"--model.path={dense}", *TINY_FLAGS, *WANDA, "--output_dir=out"]) == 0
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert main(["export", "--model.path=out/model", "--layout=bitmask", "--output_dir=small"]) == 0
    assert torch.equal(logits(hfprune.load("small")), logits(model))
    assert main(["export", "--model.path=small", "--layout=uniform", "--output_dir=plain"]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("plain")), logits(model))
    assert (
        main(["evaluate", "--model.path=small", "--data.eval_windows=1", "--data.eval_window=16", "--latency=false"])
        == 0
    )
