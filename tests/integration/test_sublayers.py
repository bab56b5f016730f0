"""Runs that remove whole attentions and MLPs: scores, files, resume, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hfprune
from hfprune.cli import main
from hfprune.models.sublayers import NoAttention, NoMLP
from hfprune.modules import PruningModule
from hfprune.plan import PruningPlan
from tests.helpers.models import token_ids

pytestmark = pytest.mark.usefixtures("empty_folder", "undrawn")

SMALL = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=0", "--latency=false"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--pruning_ratio=0.25"]
MIX = ["--importance.units=mlp,attention_sublayers", "--importance.criterion=ActivationNorm", "--layout=per_layer"]
MIX += ["--importance.depth_scores=kl"]
TRAINED = ["--data.recovery_sequences=16", "--data.validation_sequences=2", "--data.batch_size=4"]
TRAINED += ["--importance.recovery.rank=2", "--trainer.max_epochs=2", "--checkpoint_steps=1"]


@pytest.fixture
def run(dense):
    def run(command, *flags, out="out"):
        return main([command, f"--model.path={dense}", f"--output_dir={out}", *SMALL, *flags])

    return run


class Killed(BaseException):
    """What a test raises in place of SIGKILL."""


def weights(out):
    return load_file(Path(out, "model/model.safetensors"))


def test_neurons_and_attentions_under_one_budget(run):
    assert run("prune", *MIX, "--importance.compensation=LeastSquares") == 0
    plan, report = PruningPlan.load("out"), json.loads(Path("out/report.json").read_text())
    (lost,) = plan.removed_sublayers("attention_sublayers")
    scores = hfprune.io.save.load_importance("out")
    values = [float(scores[f"model.layers.{layer}.attention_sublayer"]) for layer in range(3)]
    assert values[lost] == min(values) > 0
    assert plan.provenance["depth_scores"] == {"measure": "kl", "sequences": 16, "greedy": False}
    stage = report["stages"]["pruned"]
    assert stage["parameters"] == plan.provenance["budget"]["params"]
    assert 3 * stage["size"]["kv_cache_bytes"] == 2 * report["stages"]["dense"]["size"]["kv_cache_bytes"]
    page = Path("out/report.html").read_text()
    assert "attention sub-layers 3 to 2 in all" in page
    assert "Scores of layers and sub-layers" in page
    model = hfprune.load("out/model")
    assert isinstance(model.model.layers[lost].self_attn, NoAttention)
    with_cache, without = (
        model.generate(token_ids(1, 6), max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.slow
def test_a_killed_run_continues(run, monkeypatch, capsys):
    assert run("fit", *MIX, *TRAINED, out="whole") == 0
    original = PruningModule.training_step

    def step(self, *args):
        if self.trainer.global_step == 5:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PruningModule, "training_step", step)
        with pytest.raises(Killed):
            run("fit", *MIX, *TRAINED)
    other = [flag.replace("=kl", "=cosine") for flag in MIX]
    assert run("fit", *other, *TRAINED, "--ckpt_path=last") == 2
    assert "depth_scores" in capsys.readouterr().err
    assert run("fit", *MIX, *TRAINED, "--ckpt_path=last") == 0
    whole, found = weights("whole"), weights("out")
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_sublayers_alone(run):
    flags = ["--importance.units=attention_sublayers,mlp_sublayers", "--layout=per_layer"]
    assert run("prune", *flags, "--importance.depth_scores.greedy=true") == 0
    plan, model = PruningPlan.load("out"), hfprune.load("out/model")
    replaced = sum(isinstance(module, NoAttention | NoMLP) for module in model.modules())
    lost = sum(not plan.keep[group.name] for group in plan.groups)
    assert lost == replaced + 2 * len(plan.removed_layers()) > 0  # a layer without both is removed
    assert plan.provenance["calibration"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([MIX[0], MIX[1]], "cannot state a layer without its attention. Use --layout 'per_layer'"),
        ([*MIX, "--importance.rounds=2"], "leave 'attention_sublayers' out"),
        ([*MIX, "--importance.allocation=GlobalRank"], "GlobalRank cannot remove whole sub-layers"),
        (["--importance.depth_scores=kl"], "the units are mlp. Add one of attention_sublayers"),
        (["--importance.units=mlp_sublayers,channels"], "'channels' cannot be combined with 'mlp_sublayers'"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(run, flags, message, capsys):
    assert run("prune", *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()
