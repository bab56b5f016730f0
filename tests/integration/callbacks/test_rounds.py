"""Pruning in rounds: against scoring really pruned models, resumed in every round, and what is refused."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.allocation import Explicit, GlobalRank, keep_top
from hfprune.cli import main
from hfprune.compensation import LeastSquares
from hfprune.criteria import ActivationNorm, ActivationTaylor, Magnitude, Reconstruction, SelfDistillation
from hfprune.models import config_values, find_groups, parameter_count
from hfprune.models.surgery import apply_plan
from hfprune.plan import PruningPlan
from hfprune.pruning.rounds import Rounds
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny
from tests.helpers.stops import Stop, StopInCalibration
from tests.helpers.toys import calibrate

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
DATA = {
    "seq_len": 16,
    "calibration_sequences": 6,
    "recovery_sequences": 2,
    "validation_sequences": 1,
    "eval_windows": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), dtype=torch.float64)


def prune(folder, *callbacks, ckpt_path=None, **options):
    module = PruningModule(folder, dtype="float64")
    importance = TaylorImportanceCallback(**{"pruning_ratio": 0.35, "checkpoint_every": 1} | options)
    trainer = PruneTrainer(
        callbacks=[importance, *callbacks], accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.prune(module, TextDataModule(**DATA), ckpt_path=ckpt_path)
    return module, importance


def by_hand(folder, units, criterion, widths):
    """Cuts a copy of the model after every round, scores what is left of it, and keeps track of what that was."""
    module = PruningModule(folder, dtype="float64")
    module.configure_model()
    data = TextDataModule(**DATA)
    data.bind(module.tokenizer, vocab_size=module.vocab_size, max_positions=module.max_positions)
    batches = [{"input_ids": row[None]} for batch in data.calibration_dataloader() for row in batch["input_ids"]]
    model = copy.deepcopy(module.causal_lm)
    left = {g.name: tuple(range(g.num_units)) for g in find_groups(model, units)}
    for found in widths:
        groups = find_groups(model, units)
        scores = calibrate(model, criterion, "entropy", groups=groups, batches=batches)
        keep = {g.name: keep_top(scores[g.name], width) for g, width in zip(groups, found, strict=True)}
        name = type(model).__name__
        apply_plan(
            model, PruningPlan(model_class=name, groups=groups, keep=keep, config=config_values(model, groups, keep))
        )
        left = {g: tuple(left[g][unit] for unit in kept) for g, kept in keep.items()}
    return left


@pytest.mark.parametrize("criterion", [ActivationTaylor(), ActivationNorm()], ids=["taylor", "norm"])
@pytest.mark.parametrize("units", [("mlp",), ("mlp", "heads")], ids="+".join)
def test_each_round_scores_the_model_that_the_ones_before_left(folder, units, criterion):
    options = {"units": units, "criterion": criterion, "rounds": 3, "schedule": "linear"}
    module, importance = prune(folder, **options)
    widths = Rounds(number=3, schedule="linear").widths(
        importance._find(PruningModule(folder)), importance.options.budget, None, importance.resolved.widths
    )
    assert len(widths) == 3
    assert all(a >= b for one, two in pairwise(widths) for a, b in zip(one, two, strict=True))
    assert widths[0] != widths[1] != widths[2]
    assert tuple(widths[-1]) == importance.resolved.widths
    assert module.plan.keep == by_hand(folder, units, criterion, widths)
    once, _ = prune(folder, **options | {"rounds": 1})
    assert once.plan.keep != module.plan.keep  # on this model the rounds matter
    assert parameter_count(once.causal_lm) == parameter_count(module.causal_lm)
    assert module.plan.provenance["rounds"] == {"number": 3, "schedule": "linear"}
    for group in find_groups(PruningModule(folder).meta_model(), units):
        gone = set(range(group.num_units)) - set(module.plan.keep[group.name])
        scores = importance.importance[group.name]
        assert max((float(scores[unit]) for unit in gone), default=0) <= min(
            float(scores[unit]) for unit in module.plan.keep[group.name]
        )


def test_schedules():
    assert Rounds(number=4, schedule="linear").shares() == [0.25, 0.5, 0.75, 1.0]
    assert Rounds(number=4).shares() == pytest.approx([0.578125, 0.875, 0.984375, 1.0])
    assert Rounds().shares() == [1.0]


@pytest.mark.parametrize("after", [2, 8, 15])
def test_left_in_any_round_and_taken_up_it_keeps_the_same(folder, tmp_path, monkeypatch, after):
    options = {"rounds": 3, "units": ("mlp", "heads")}
    straight, importance = prune(folder, **options)
    stop = StopInCalibration(monkeypatch, after)
    with pytest.raises(Stop):
        prune(folder, ModelCheckpoint(dirpath=tmp_path), **options)
    path = str(tmp_path / "last-pruning.ckpt")
    with pytest.raises(ConfigError, match="other settings: rounds 3 rounds, cubic -> 2 rounds, cubic"):
        prune(folder, ckpt_path=path, **options | {"rounds": 2})
    resumed, again = prune(folder, ckpt_path=path, **options)
    assert stop.count == 3 * DATA["calibration_sequences"]  # nothing was run twice
    assert resumed.plan.keep == straight.plan.keep
    assert all(torch.equal(score, again.importance[name]) for name, score in importance.importance.items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"criterion": Magnitude()}, "Magnitude does not\\."),
        ({"criterion": Reconstruction()}, "Reconstruction does not\\."),
        ({"units": ("mlp", "layers")}, "leave 'layers' out"),
        ({"allocation": Explicit(mlp=12), "pruning_ratio": None}, "sets the widths itself"),
        ({"allocation": GlobalRank()}, "GlobalRank.* needs scores"),
        (
            {"self_distillation": SelfDistillation(), "objective": None},
            "rounds=2 and `self_distillation` cannot be combined",
        ),
        ({"rounds": 0}, "rounds=0 must be positive"),
        ({"schedule": "square"}, "not one of linear, cubic"),
    ],
)
def test_what_does_not_go_with_rounds(folder, options, text):
    with pytest.raises(ConfigError, match=text):
        prune(folder, **{"rounds": 2} | options)


def test_a_run_of_the_command_line_with_a_fit_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = save_tiny(tmp_path / "dense")
    flags = [
        "--pruning_ratio=0.25",
        "--importance.rounds=2",
        "--importance.compensation=LeastSquares",
        "--latency=false",
    ]
    data = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=2", "--data.eval_window=16"]
    assert main(["prune", f"--model.path={dense}", "--output_dir=out", *flags, *data]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["plan"]["rounds"] == {"number": 2, "schedule": "cubic"}
    assert report["plan"]["compensation"]["name"] == LeastSquares().describe()["name"]
    assert report["saved"]["parameters"] == report["plan"]["budget"]["params"]
