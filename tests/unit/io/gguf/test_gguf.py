"""GGUF files: which architecture states a model, what a file holds, and what is refused before writing."""

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hfprune
from hfprune.io.gguf import FAMILIES, check_gguf, export_gguf, is_own_gguf
from hfprune.models import find_groups
from hfprune.models.groups import find_layers
from hfprune.utils.errors import ConfigError, OutputError
from tests.helpers.models import NAMES, configs, table, tiny
from tests.helpers.plans import head_plan, mlp_plan

gguf = pytest.importorskip("gguf")


def cut(name, *, widths=None, heads=None, **changes):
    """Returns a tiny model after a plan, without weights."""
    model = built(name, device="meta", **changes)
    for plan in ([mlp_plan(model, widths)] if widths else []) + ([head_plan(model, heads)] if heads else []):
        hfprune.apply_plan(model, plan)
    return model


def built(name, *, device="cpu", **changes):
    """Returns a tiny model in float32 with other values in its config."""
    config = configs()[name]
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def read(path):
    """Returns the metadata and the tensors of a file, dequantised, [out, in]."""
    reader = gguf.GGUFReader(path)
    data = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return data, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


UNIFORM, UNEVEN = (20, 20, 20), (11, 7, 18)
CASES = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "phi3": ("phi3", "deci"),
    "gemma2": ("gemma2", None),
    "gemma3": ("gemma3", None),
    "qwen3": ("qwen3", None),  # its head is not tied
    "gpt2_n_inner": ("gpt2", None),
}


@pytest.mark.parametrize("name", CASES)
def test_uniform_models_have_their_own_architecture_and_uneven_ones_one_with_values_per_layer(name):
    own, per_layer = CASES[name]
    found = check_gguf(cut(name, widths=UNIFORM))
    assert (found.arch, found.widths, found.per_layer) == (own, UNIFORM, False)
    uneven = cut(name, widths=UNEVEN)
    if per_layer is None:
        with pytest.raises(ConfigError, match=r"(?s)have 7 to 18.*layout='padded'"):
            check_gguf(uneven)
    else:
        found = check_gguf(uneven)
        assert (found.arch, found.widths, found.per_layer) == (per_layer, UNEVEN, True)


def test_the_files_of_a_tied_qwen3_have_values_per_layer():
    assert check_gguf(cut("qwen3", widths=UNEVEN, tie_word_embeddings=True)).arch == "openelm"


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_heads_that_no_longer_fill_the_hidden_size_need_values_per_layer(name):
    found = check_gguf(cut(name, heads=[(0,), (1,), (0,)]))
    assert (found.arch, found.heads, found.kv_heads, found.head_size) == ("deci", (2, 2, 2), (1, 1, 1), 4)


def test_experts(tmp_path):
    model = tiny("qwen3_moe", dtype=torch.float32)
    with pytest.raises(ConfigError, match="norm_topk_prob=True, the model with False"):
        check_gguf(model)
    model.config.norm_topk_prob = True
    groups = find_groups(model, ("experts",))
    hfprune.apply_plan(model, hfprune.make_plan(model, keep={group.name: (0, 2, 3, 5) for group in groups}))
    export_gguf(model, None, tmp_path / "m.gguf", gguf_type="f16")
    data, tensors, kinds = read(tmp_path / "m.gguf")
    assert (data["qwen3moe.expert_count"], data["qwen3moe.expert_used_count"]) == (4, 2)
    assert data["qwen3moe.expert_feed_forward_length"] == 12
    assert (tensors["blk.0.ffn_up_exps.weight"].shape, kinds["blk.0.ffn_gate_inp.weight"]) == ((4, 12, 16), "F32")
    stacked = find_layers(model)[0].mlp.experts.gate_up_proj.detach().half()
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight"], stacked[:, 12:].float())
    model = tiny("mixtral", dtype=torch.float32)
    hfprune.apply_plan(model, hfprune.make_plan(model, keep={"model.layers.1.mlp.experts": (0, 2, 3)}))
    with pytest.raises(ConfigError, match="the same number of experts in every layer"):
        check_gguf(model)


REFUSED = {
    "opt": ({}, "OPTForCausalLM cannot be written as GGUF"),
    "llama_mha_relu": ({}, "the model uses 'relu'"),
    "gemma2": ({"query_pre_attn_scalar": 100}, r"the model by 100 \*\* -0.5"),
    "gemma3": ({"query_pre_attn_scalar": 100}, r"the model by 100 \*\* -0.5"),
    "gpt2": ({"scale_attn_by_inverse_layer_idx": True}, "scales attention by the size of a head alone"),
    "gpt_neox": ({}, "rotates pairs of channels, the model 1 channels"),
    "qwen2": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10.0, "factor": 8.0, "low_freq_factor": 1.0}
         | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        "does not state the rotary scaling 'llama3'",
    ),
    "qwen3": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, "factor": 2.0, "beta_fast": 16.0}
         | {"original_max_position_embeddings": 32}},
        "does not read beta_fast of YaRN",
    ),
    "phi3": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0}}, "scaling 'linear'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_architecture_does_not_compute_is_refused_before_writing(name, tmp_path):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        export_gguf(built(name, device="meta", **changes), None, tmp_path / "model.gguf")
    assert not os.listdir(tmp_path)


def test_a_family_without_a_table_is_a_tiny_model_that_is_refused():
    assert {name for name in NAMES if table(name).model_class not in FAMILIES} == {"opt", "opt_350m_style"}


def test_values_per_layer_are_lists_of_the_layers_own(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    for plan in (mlp_plan(model, UNEVEN), head_plan(model, [(0, 1), (1,), (0,)])):
        hfprune.apply_plan(model, plan)
    saved = export_gguf(model, None, tmp_path / "m.gguf", gguf_type="f32")
    data, tensors, _ = read(tmp_path / "m.gguf")
    assert saved["architecture"] == data["general.architecture"] == "deci"
    assert data["deci.feed_forward_length"] == [11, 7, 18]
    assert data["deci.attention.head_count"] == [4, 2, 2]
    assert data["deci.attention.head_count_kv"] == [2, 1, 1]
    assert [tensors[f"blk.{i}.attn_q.weight"].shape for i in range(3)] == [(16, 16), (8, 16), (8, 16)]
    assert "output.weight" not in tensors  # tied
    assert saved["parameters"] == sum(p.numel() for p in model.parameters())


def test_weights_are_those_of_the_model_with_rotated_pairs_as_neighbours(tmp_path):
    model = tiny("llama_untied_bias", dtype=torch.float32)
    export_gguf(model, None, tmp_path / "m.gguf", gguf_type="f32")
    _, tensors, _ = read(tmp_path / "m.gguf")
    layer = find_layers(model)[1]
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight.detach())
    np.testing.assert_array_equal(tensors["output.weight"], model.lm_head.weight.detach())
    query = layer.self_attn.q_proj.bias.detach()
    for head in range(4):
        for pair in range(2):  # channels pair and pair + 2 of a head of 4
            for half in range(2):
                assert tensors["blk.1.attn_q.bias"][4 * head + 2 * pair + half] == query[4 * head + pair + 2 * half]


def test_norms_of_gemma_hold_one_plus_the_weight(tmp_path):
    model = tiny("gemma3", dtype=torch.float32)
    export_gguf(model, None, tmp_path / "m.gguf", gguf_type="f32")
    _, tensors, _ = read(tmp_path / "m.gguf")
    np.testing.assert_array_equal(tensors["output_norm.weight"], 1 + model.model.norm.weight.detach())
    norm = find_layers(model)[0].self_attn.q_norm.weight.detach()
    np.testing.assert_array_equal(tensors["blk.0.attn_q_norm.weight"], 1 + norm)


def test_layers_that_were_removed_leave_the_windows_of_the_others(tmp_path):
    model = tiny("gemma2", dtype=torch.float32)
    (group,) = find_groups(model, ("layers",))
    hfprune.apply_plan(model, hfprune.make_plan(model, keep={group.name: (0, 2)}))
    export_gguf(model, None, tmp_path / "m.gguf")
    data, _, _ = read(tmp_path / "m.gguf")
    assert data["gemma2.block_count"] == 2
    assert data["gemma2.attention.sliding_window_pattern"] == [True, True]


def test_a_window_that_the_architecture_lacks_limits_the_context(tmp_path):
    saved = export_gguf(tiny("mistral", dtype=torch.float32), None, tmp_path / "m.gguf")
    assert (saved["context_length"], saved["window"]) == (8, 8)
    saved = export_gguf(tiny("gemma3", dtype=torch.float32), None, tmp_path / "g.gguf")
    assert (saved["context_length"], saved["window"]) == (64, None)


def wide():
    """Returns a model with rows of 32 and 48 weights."""
    return built("llama", hidden_size=32, intermediate_size=48, head_dim=8)


@pytest.mark.parametrize(
    ("kind", "step"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 250), ("q4_0", 1 / 12)]
)
def test_types_and_rows_that_no_block_fits(kind, step, tmp_path):
    model = wide()
    saved = export_gguf(model, None, tmp_path / "m.gguf", gguf_type=kind)
    _, tensors, kinds = read(tmp_path / "m.gguf")
    quantised = kind in ("q8_0", "q4_0")
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == kind.upper()
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if quantised else kind.upper())
    assert kinds["token_embd.weight"] == ("Q8_0" if quantised else kind.upper())
    assert saved["unquantised"] == ([f"blk.{i}.ffn_down.weight" for i in range(3)] if quantised else [])
    assert saved["bytes"] == (tmp_path / "m.gguf").stat().st_size
    weight = find_layers(model)[0].mlp.up_proj.weight.detach().numpy()
    limit = step * np.abs(weight).max()
    assert 0 <= np.abs(tensors["blk.0.ffn_up.weight"] - weight).max() <= limit


def test_rows_are_converted_in_groups(tmp_path, monkeypatch):
    model = wide()
    export_gguf(model, None, tmp_path / "a.gguf", gguf_type="q8_0")
    monkeypatch.setattr("hfprune.io.gguf.export._ROWS", 5)
    export_gguf(model, None, tmp_path / "b.gguf", gguf_type="q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_name_by_which_llama_cpp_asks_for_tokens_is_left_out(tmp_path):
    model = wide()
    for name, expected in (("org/my-phi3-model", None), ("org/my-llama", "my-llama")):
        model.config._name_or_path = model.name_or_path = name
        export_gguf(model, None, tmp_path / "m.gguf", overwrite=True)
        assert read(tmp_path / "m.gguf")[0].get("general.name") == expected


def test_auto_follows_the_type_of_the_model(tmp_path):
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "f16"), (torch.float16, "f16")):
        path = tmp_path / f"{dtype}.gguf"
        assert export_gguf(wide().to(dtype), None, path)["gguf_type"] == kind


def test_values_beyond_half_precision_are_not_written_as_infinite(tmp_path):
    model = wide()
    with torch.no_grad():
        find_layers(model)[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(OutputError, match="ffn_up.weight has values beyond the range of f16"):
        export_gguf(model, None, tmp_path / "m.gguf")
    assert not os.listdir(tmp_path)


def test_llama3_scaling_is_a_tensor_of_the_divisors_that_transformers_uses(tmp_path):
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": "llama3", "rope_theta": 77.0, **settings}
    model = built("llama", rope_parameters=rope, hidden_size=64, head_dim=16)
    export_gguf(model, None, tmp_path / "m.gguf")
    _, tensors, _ = read(tmp_path / "m.gguf")
    plain = 1 / 77.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(torch.tensor(tensors["rope_freqs.weight"]), plain / model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("extra", [{}, {"attention_factor": 1.5}, {"mscale": 0.5, "mscale_all_dim": 1.0}])
def test_yarn_states_the_factor_of_queries_and_keys(extra, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 77.0, "factor": 4.0, "original_max_position_embeddings": 16, **extra}
    model = built("qwen2", rope_parameters=rope)
    export_gguf(model, None, tmp_path / "m.gguf")
    data, _, _ = read(tmp_path / "m.gguf")
    assert (data["qwen2.rope.scaling.type"], data["qwen2.rope.scaling.factor"]) == ("yarn", 4.0)
    own = 1 + 0.1 * np.log(4.0)  # what llama.cpp multiplies by itself
    ratio = data.get("qwen2.rope.scaling.attn_factor", 1.0)
    assert own * ratio == pytest.approx(model.model.rotary_emb.attention_scaling, rel=1e-6)


# the file


def test_a_file_is_replaced_only_if_hfprune_wrote_it(tmp_path):
    model, path = wide(), tmp_path / "m.gguf"
    export_gguf(model, None, path)
    before = path.read_bytes()
    assert is_own_gguf(path)
    with pytest.raises(ConfigError, match="overwrite=True"):
        export_gguf(model, None, path)
    export_gguf(model, None, path, overwrite=True)
    assert path.read_bytes() == before
    path.write_bytes(b"GGUF" + bytes(5000))
    with pytest.raises(ConfigError, match="hfprune did not write it"):
        export_gguf(model, None, path, overwrite=True)
    with pytest.raises(ConfigError, match="is a folder"):
        export_gguf(model, None, tmp_path)


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = wide(), tmp_path / "m.gguf"
    export_gguf(model, None, path)
    before = path.read_bytes()

    def full(self, tensor, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_gguf(model, None, path, overwrite=True)
    assert (os.listdir(tmp_path), path.read_bytes()) == (["m.gguf"], before)


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr("hfprune.io.gguf.export.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="its disk has only 0 MiB free"):
        export_gguf(wide(), None, tmp_path / "m.gguf")
    assert not os.listdir(tmp_path)


def test_the_extra_is_named_where_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.io.gguf.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hfprune\[serve\]'"):
        export_gguf(wide(), None, tmp_path / "m.gguf")


def test_an_unknown_type_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean 'q8_0'\? Known: auto, f32.*llama-quantize"):
        export_gguf(wide(), None, tmp_path / "m.gguf", gguf_type="q8_1")
