"""Inspections say what plan and files say."""

import json

import pytest
import torch
from transformers import AutoConfig

import hfprune
from hfprune.models.twins import twin
from hfprune.publishing import inspection
from hfprune.publishing.inspection import inspect_folder, inspection_text
from hfprune.utils.errors import ConfigError, PlanError
from tests.helpers.models import NAMES, save_tiny, tiny


def pruned(folder, keep, layout="uniform", name="llama"):
    model = tiny(name, dtype=torch.float32)
    plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(n) for i, n in enumerate(keep)})
    hfprune.apply_plan(model, plan)
    hfprune.save(model, folder, plan=plan, layout=layout)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_widths_and_parameters_are_read_from_the_headers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_architecture", lambda path: {"refused": "not of interest here"})
    model = tiny(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    found = inspect_folder(str(tmp_path))
    assert found["model"]["parameters"] == model.num_parameters()
    assert found["model"]["mlp_widths"] == list(hfprune.models.mlp_widths(model))
    assert found["model"]["class"] == type(model).__name__
    assert "removed" not in found


@pytest.mark.parametrize(
    ("layout", "keep", "loader"),
    [
        ("uniform", (12, 12, 12), "transformers"),
        ("per_layer", (12, 8, 24), "hfprune"),
        ("padded", (12, 8, 24), "transf"),
    ],
)
def test_layout_loader_and_removed_units(layout, keep, loader, tmp_path):
    pruned(tmp_path / "model", keep, layout)
    found = inspect_folder(str(tmp_path / "model"))
    assert found["layout"] == layout
    assert found["loads_with"].startswith(loader)
    assert found["removed"]["mlp"] == {"dense": 72, "kept": sum(keep), "removed": 72 - sum(keep)}
    assert [row["mlp"]["kept"] for row in found["layers"]] == list(keep)
    text = inspection_text(found)
    assert f"layer 1: MLP neurons {keep[1]} of 24" in text
    assert json.loads(json.dumps(found)) == found


def test_exports_say_which_version_and_plan_they_are_of(tmp_path):
    pruned(tmp_path / "model", (12, 12, 12))
    plan = hfprune.PruningPlan.load(tmp_path / "model")
    assert inspect_folder(str(tmp_path / "model"))["model"]["hfprune"] == {
        "version": hfprune.__version__,
        "plan": plan.digest(),
    } | ({"base_model": plan.provenance["model"]["path"]} if plan.provenance["model"]["path"] else {})


def test_the_report_beside_the_model_is_shown(tmp_path):
    pruned(tmp_path / "model", (12, 12, 12))
    stages = {
        "dense": {"perplexity": {"value": 10.0}},
        "pruned": {"perplexity": {"value": 12.5}, "fidelity": {"kl": 0.2}},
    }
    (tmp_path / "report.json").write_text(json.dumps({"stages": stages, "command": "hfprune prune x", "plan": {}}))
    found = inspect_folder(str(tmp_path))
    assert found["figures"] == {"dense": {"perplexity": 10.0}, "pruned": {"perplexity": 12.5, "kl": 0.2}}
    assert found["recipe"]["command"] == "hfprune prune x"
    assert "pruned: perplexity 12.5, kl 0.2" in inspection_text(found)


def test_what_is_no_model_or_damaged_is_said(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        inspect_folder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="neither a model"):
        inspect_folder(str(tmp_path))
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="report.json' cannot be read"):
        inspect_folder(str(tmp_path))
    (tmp_path / "report.json").unlink()
    (tmp_path / "model/model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ConfigError, match="damaged or cut off"):
        inspect_folder(folder)
    (tmp_path / "model/plan.json").write_text("{}")
    with pytest.raises(PlanError, match="Not a pruning plan"):
        inspect_folder(folder)


def test_a_removed_layer_does_not_make_a_layout_padded(tmp_path):
    model = tiny(dtype=torch.float32)
    keep = {"model.layers": (0, 2), "model.layers.0.mlp": range(12), "model.layers.2.mlp": range(12)}
    plan = hfprune.make_plan(model, keep=keep, units=("mlp", "layers"))
    hfprune.apply_plan(model, plan)
    hfprune.save(model, tmp_path / "model", plan=plan)
    found = inspect_folder(str(tmp_path / "model"))
    assert (found["layout"], found["model"]["mlp_widths"]) == ("uniform", [12, 12])
    assert found["removed"]["mlp"] == {"dense": 72, "kept": 24, "removed": 48}
    assert "layer 1: removed" in inspection_text(found)


def test_a_bitmask_folder_has_the_parameters_of_the_model(tmp_path):
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[:, ::2] = 0
    hfprune.save(model, tmp_path / "model", layout="bitmask")
    found = inspect_folder(str(tmp_path / "model"))
    assert found["layout"] == "bitmask"
    assert (found["model"]["parameters"], found["model"]["mlp_widths"]) == (model.num_parameters(), [24, 24, 24])


def test_the_architecture_of_a_dense_model_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "cache"))
    folder = save_tiny(tmp_path / "model")
    found = inspect_folder(folder)
    units = found["architecture"]["units"]
    assert found["architecture"]["described_by"] == "table"
    assert units["mlp"] == {
        "removable": True,
        "groups": 3,
        "per_group": [24, 24],
        "layouts": ["uniform", "padded", "per_layer"],
    }
    assert units["heads"]["per_group"] == [2, 2]
    assert json.loads(json.dumps(found)) == found
    text = inspection_text(found)
    assert "architecture: 3 layers, described by a table of hfprune, proven on a tiny model of the class" in text
    assert "MLP neurons: 24 in each of 3 layers; layouts uniform, padded, per_layer" in text
    assert "layout per_layer: hfprune.load" in text


def test_reasons_of_what_cannot_be_removed_are_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "cache"))
    tiny("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "gpt2")
    text = inspection_text(inspect_folder(str(tmp_path / "gpt2")))
    assert "hidden channels: cannot be removed: its LayerNorms subtract the mean" in text
    assert "key-value heads: 4 in each of 3 layers; layouts per_layer (A stock config of GPT2LMHeadModel" in text


def test_a_config_that_no_class_reads_still_shows_the_headers(tmp_path):
    folder = save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    found = inspect_folder(folder)
    assert found["model"]["class"] == "LlamaForCausalLM"
    assert "unheard_of" in found["architecture"]["refused"]
    assert "nothing can be removed" in inspection_text(found)


def test_saved_buffers_and_shared_experts_are_not_counted(tmp_path):
    model = tiny("deepseek_v3_groups", dtype=torch.float32)
    keep = {f"model.layers.{i}.mlp.experts.group{part}": (0, 2) for i in (1, 2) for part in (0, 1)}
    plan = hfprune.make_plan(model, keep=keep, units=("experts",))
    hfprune.apply_plan(model, plan)
    saved = hfprune.save(model, tmp_path / "model", plan=plan)
    found = inspect_folder(str(tmp_path / "model"))
    assert found["model"]["parameters"] == saved["parameters"] == model.num_parameters()
    assert found["model"]["mlp_widths"] == [24]  # of the dense first layer
    assert found["removed"]["experts"] == {"dense": 12, "kept": 8, "removed": 4}
    assert "layer 2: experts 4 of 6" in inspection_text(found)


def test_a_class_without_a_table_is_derived(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "cache"))
    twin(AutoConfig.for_model("olmo2"), dtype=torch.float32).save_pretrained(tmp_path / "olmo2")
    found = inspect_folder(str(tmp_path / "olmo2"))["architecture"]
    assert found["described_by"] == "derived"
    assert found["units"]["mlp"]["per_group"] == [37, 37]
    assert "norm" in found["units"]["heads"]["reason"]
    assert len(list((tmp_path / "cache/proofs").iterdir())) == 1
