"""Model cards hold what the report says, and replace no card of somebody else."""

import json

import pytest
import torch

import hfprune
from hfprune.io.output_folder import check_replaceable, is_card
from hfprune.publishing.card import model_card, write_card
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny

REPORT = {
    "command": "hfprune prune --model.path org/base --pruning_ratio 0.2",
    "stages": {
        "dense": {"parameters": 6848, "perplexity": {"value": 10.0, "source": "org/text:en", "protocol": "P"}},
        "pruned": {
            "parameters": 6000,
            "perplexity": {"value": 12.5, "source": "org/text:en", "protocol": "P"},
            "fidelity": {"kl": 0.25},
            "zero_shot": {"tasks": {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "num_items": 20, "num_fewshot": 0}}},
        },
        "recovered": {"parameters": 6000, "perplexity": {"value": "inf", "source": "org/text:en"}},
    },
    "data": {"calibration": {"source": "org/calibration", "tokens": 64}, "recovery": {"source": "data/alpaca.json"}},
    "recovery": {"rank": 8},
    "warnings": ["Little data."],
    "plan": {},
}


def run_folder(folder, stages=("dense", "pruned"), **changes):
    model = tiny(dtype=torch.float32)
    plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(12) for i in range(3)})
    hfprune.apply_plan(model, plan)
    hfprune.save(model, folder / "model", plan=plan)
    report = REPORT | {"stages": {name: REPORT["stages"][name] for name in stages}} | changes
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_metadata_of_the_card(tmp_path):
    card = model_card(run_folder(tmp_path), base_model="org/base", license="mit", repo="me/small")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "finetune", "mit")
    assert data["datasets"] == ["org/calibration"]  # alpaca.json is a file
    assert data["tags"] == ["hfprune", "pruning"]
    measured = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured == {("org/text", "perplexity"): 12.5, ("org/text", "kl_divergence"): 0.25, ("piqa", "acc"): 0.5}


def test_text_of_the_card(tmp_path):
    text = model_card(run_folder(tmp_path), repo="me/small").text
    assert REPORT["command"] in text
    assert 'from_pretrained("me/small")' in text
    assert "- MLP neurons: 36 of 72 (50.0%)" in text
    assert "| perplexity | 10 | 12.5 |" in text
    assert "| piqa, acc | - | 0.5 |" not in text  # a task of one stage has one cell a stage
    assert "- Little data." in text
    assert "not trained after pruning" in text
    assert "alpaca.json" in text
    assert "data/alpaca" not in text


def test_a_figure_that_is_not_finite_is_left_out_of_the_index(tmp_path):
    card = model_card(run_folder(tmp_path, ("dense", "pruned", "recovered")), repo="me/small")
    assert card.data.eval_results is None
    assert "not trained" not in card.text


def test_the_license_is_that_of_the_base_model(tmp_path):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: own\n---\ntext\n")
    model = hfprune.load(base)
    plan = hfprune.make_plan(model, keep={"model.layers.0.mlp": range(12), "model.layers.1.mlp": range(12)})
    hfprune.apply_plan(model, plan)
    hfprune.save(model, tmp_path / "run/model", plan=plan, layout="per_layer")
    card = model_card(tmp_path / "run")
    assert (card.data.license, card.data.to_dict()["license_name"], card.data.base_model) == ("other", "own", None)
    assert 'hfprune.load("run")' in card.text
    assert str(tmp_path) not in str(card)


def test_a_card_is_written_once_and_may_be_replaced_with_the_model(tmp_path):
    run_folder(tmp_path)
    path = write_card(tmp_path)
    assert is_card(path)
    check_replaceable(tmp_path / "model", overwrite=True, argument="target")
    with pytest.raises(ConfigError, match="there already"):
        write_card(tmp_path)
    write_card(tmp_path, overwrite=True)
    path.write_text("# My own notes on hfprune\n")
    assert not is_card(path)
    with pytest.raises(ConfigError, match=r"did not write 'README\.md'"):
        check_replaceable(tmp_path / "model", overwrite=True, argument="target")


def test_a_model_that_hfprune_did_not_write_gets_no_card(tmp_path):
    with pytest.raises(ConfigError, match="did not write this model"):
        model_card(save_tiny(tmp_path / "base"))
    with pytest.raises(ConfigError, match="has no adapter"):
        model_card(run_folder(tmp_path), what="adapter")
