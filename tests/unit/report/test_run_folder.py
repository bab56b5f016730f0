"""Reading and writing of the folder of a run."""

import json
import math
import os

import pytest
import torch

from hfprune.io.save import save_importance
from hfprune.plan import PLAN_FILE, Group, PruningPlan, Slice
from hfprune.report import (
    ConvergencePoint,
    Generation,
    ReportData,
    figures,
    read_run,
    render,
    write_report,
)
from hfprune.report.data import number
from hfprune.utils.errors import ConfigError, OutputError, PlanError
from tests.helpers.reports import full, full_page


def write_run(folder, **changes):
    report = {
        "command": "hfprune fit --model.path=some/model",
        "seconds": 605.0,
        "stages": {"dense": {"parameters": 10, "perplexity": {"value": "inf", "protocol": "p"}}},
        "saved": {},
        "warnings": ["look"],
        "plan": {
            "budget": {"asked": "pruning_ratio=0.2", "dense_params": 10000, "params": 8000},
            "model": {"path": "some/model", "revision": None},
        },
        "recovery": None,
        "data": {
            "calibration": {
                "source": "builtin",
                "sequences": 4,
                "tokens": 6400,
                "bos": "no BOS added",
                "sha256": "ab" * 32,
            }
        },
        "versions": {"torch": "2"},
        "config": {"seed_everything": 7},
    }
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report | changes))
    return folder


def write_plan(folder):
    groups = tuple(
        Group(name=f"layers.{i}.mlp", kind="mlp", num_units=4, slices=(Slice(module=f"l.{i}", side="in"),))
        for i in range(2)
    )
    keep = {"layers.0.mlp": (0, 2), "layers.1.mlp": (1, 2, 3)}
    PruningPlan(model_class="M", groups=groups, keep=keep, config={}).save(folder / PLAN_FILE)


def test_read_run(tmp_path):
    folder = write_run(
        tmp_path / "out",
        convergence=[[64, 0.5], [128, 1]],
        generations=[{"prompt": "a", "texts": {"dense": "b"}}],
    )
    write_plan(folder)
    scores = {"layers.1.mlp": [1.0, 2.0, 3.0, 4.0], "layers.0.mlp": [1.0, 2.0, 3.0, math.nan]}
    save_importance({name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}, folder)
    data = read_run(folder)
    assert list(data.importance) == ["layers.0.mlp", "layers.1.mlp"]  # in the order of the plan
    assert data.title == "Pruning some/model, pruning_ratio=0.2"
    assert data.commands == ["hfprune fit --model.path=some/model"]
    assert data.kept == {"layers.0.mlp": (2, 4), "layers.1.mlp": (3, 4)}
    assert data.importance["layers.1.mlp"] == [1, 2, 3, 4]
    assert data.convergence[1] == ConvergencePoint(tokens=128, overlap=1.0)
    assert data.generations == [Generation(prompt="a", texts={"dense": "b"})]
    assert data.warnings == ["look"]
    assert data.facts == {
        "Budget": "pruning_ratio=0.2; parameters 10,000 to 8,000",
        "Model": "path some/model",
        "Calibration data": "builtin, 4 sequences, 6,400 tokens, no BOS added; SHA-256 abababababab",
        "Seed": "7",
        "Duration": "10 min 5 s",
        "Versions": "torch 2",
    }
    assert list(figures(data)) == ["importance_heat_map", "kept_share", "convergence"]
    assert "infinite" in render(data)


def test_read_run_of_the_least(tmp_path):
    (tmp_path / "report.json").write_text('{"stages": {}}')
    assert read_run(tmp_path) == ReportData(
        title=f"Run {tmp_path.name}", commands=[], convergence=[], generations=[], warnings=[]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no report.json"),
        ("{", "is not valid JSON"),
        ("[]", "is not the report of a run"),
        ("{}", "is not the report of a run"),
        ('{"stages": {"dense": 3}}', "every stage must be an object"),
        ('{"stages": {}, "convergence": [[1]]}', "is not the report of a run"),
        ('{"stages": {}, "generations": [{}]}', "is not the report of a run"),
    ],
)
def test_what_is_not_a_run(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)


def test_a_broken_plan_is_said(tmp_path):
    write_run(tmp_path)
    (tmp_path / PLAN_FILE).write_text("{}")
    with pytest.raises(PlanError, match=PLAN_FILE):
        read_run(tmp_path)


def test_writing_is_one_step(tmp_path, monkeypatch):
    path = write_report(full(), tmp_path / "new" / "report.html")
    before = path.read_text(encoding="utf-8")
    assert before == full_page()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_report(ReportData(title="other"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_numbers():
    assert [number(v) for v in (1, 2.5, "-inf", None, True, "12", [])] == [1.0, 2.5, -math.inf, None, None, None, None]
    assert math.isnan(number("nan"))
