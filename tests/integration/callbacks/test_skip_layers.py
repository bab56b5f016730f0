"""Skipped layers in whole runs: what is written, what a resume compares, and every kind of pruning."""

import json
from pathlib import Path

import pytest
import torch

import hfprune
from hfprune import LoraPruningCallback, LoraRecovery, PruneTrainer, PruningModule, SkipLayers, TextDataModule
from hfprune.cli import main
from hfprune.io.load import load_causal_lm
from hfprune.publishing.card import model_card
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny
from tests.helpers.runs import TINY_FLAGS

pytestmark = pytest.mark.usefixtures("undrawn", "empty_folder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def run(command, folder, *flags):
    return main([command, f"--model.path={folder}", "--output_dir=out", *TINY_FLAGS, *flags])


def test_units_on_the_command_line(folder, capsys):
    asked = ("--pruning_ratio=0.05", "--skip_layers", "-1", "--only_layers", "1:", "--layout=per_layer")
    assert run("prune", folder, *asked) == 0
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["provenance"]["skip_layers"] == {
        "skip": [-1],
        "only": ["1:"],
        "groups": ["model.layers.0.mlp", "model.layers.2.mlp"],
        "layers": [],
    }
    model = hfprune.load("out/model")
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [24, plan["provenance"]["budget"][
        "kinds"]["mlp"]["kept"][1], 24]  # fmt: skip
    shown = "skip_layers=-1, only_layers=1:"
    report = json.loads(Path("out/report.json").read_text())
    assert shown in report["plan"]["budget"]["asked"]
    assert shown in Path("out/report.html").read_text()
    assert shown in str(model_card("out"))
    capsys.readouterr()
    assert main(["inspect", "out"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pruning_ratio=0.5", "--skip_layers=0"], "the largest possible --pruning_ratio is 0.3224"),
        (["--pruning_ratio=0.05", "--skip_layers=3"], "there is no layer 3; layers are 0 to 2"),
        (["--pruning_ratio=0.05", "--only_layers=*.mpl"], "'*.mpl' matches nothing"),
        (["--pruning_ratio=0.05", "--skip_layers=0"], "layout"),
        (["--method=wanda", "--sparsity=0.5", "--skip_layers={mlp: 0}"], "unit kinds apply to the removal of units"),
        (["--method=wanda", "--sparsity=0.5", "--skip_layers=0-2"], "skips every projection"),
    ],
)
def test_what_cannot_be_skipped_is_refused_before_the_run(folder, flags, message, capsys):
    assert run("prune", folder, *flags) == 2
    err = capsys.readouterr().err
    assert (message in err, err.count("error:"), "Traceback" in err) == (True, 1, False), err
    assert not Path("out").exists()


def test_a_resumed_run_must_skip_the_same_layers(folder, capsys):
    flags = ["--pruning_ratio=0.05", "--layout=per_layer", "--importance.recovery=full"]
    flags += ["--data.recovery_sequences=2", "--data.validation_sequences=1"]
    assert run("fit", folder, *flags, "--skip_layers=0", "--trainer.max_steps=1") == 0
    capsys.readouterr()
    assert run("fit", folder, *flags, "--skip_layers=1", "--trainer.max_steps=2", "--ckpt_path=last") == 2
    err = capsys.readouterr().err
    assert "skip_layers" in err
    assert run("fit", folder, *flags, "--skip_layers=0", "--trainer.max_steps=2", "--ckpt_path=last") == 0


def test_sparse_pruning_on_the_command_line(folder):
    assert run("prune", folder, "--method=wanda", "--sparsity=2:4", "--skip_layers=*.self_attn,0") == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["plan"]["budget"]["asked"] == "sparsity=2:4, skip_layers=*.self_attn,0"
    layers = report["plan"]["sparsity"]["layers"]
    assert [sorted(layer["matrices"]) for layer in layers] == [
        [], *2 * [["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]],
    ]  # fmt: skip
    assert report["saved"]["sparsity"]["achieved"] == 0.5
    dense, pruned = load_causal_lm(folder), load_causal_lm("out/model", dtype="auto")
    for name, weight in dense.named_parameters():
        assert torch.equal(weight, pruned.get_parameter(name)) == (".mlp." not in name or ".0." in name), name


def test_lora_pruning(folder):
    data = TextDataModule(
        seq_len=16, calibration_sequences=2, recovery_sequences=4, validation_sequences=1, eval_windows=0
    )
    settings = {"pruning_ratio": 0.04, "lora": LoraRecovery(rank=2), "every": 1, "units": ("mlp",)}
    callback = LoraPruningCallback(**settings, skip_layers=SkipLayers(only=1))
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = PruneTrainer(callbacks=[callback], accelerator="cpu", max_epochs=1, **off)
    module = PruningModule(folder)
    trainer.fit(module, datamodule=data)
    assert {name: len(kept) < 24 for name, kept in callback.plan.keep.items()} == {
        f"model.layers.{i}.mlp": i == 1 for i in range(3)
    }
    assert callback.describe()["skip_layers"] == {"only": [1]}
    assert callback.plan.provenance["skip_layers"]["groups"] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    with pytest.raises(ConfigError, match="settings"):
        LoraPruningCallback(**settings).load_state_dict(callback.state_dict())
