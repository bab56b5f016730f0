"""One process, DDP and FSDP2 on two gloo processes: the same kept units, equal ranks, and runs that can be resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny

ROOT = Path(__file__).resolve().parents[2]
KILLED = 9
STRATEGIES = {"single": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def start(folder, out, strategy, **kwargs):
    name, devices = STRATEGIES[strategy]
    config = {"model": folder, "out": str(out), "strategy": name, "devices": devices} | kwargs
    command = [sys.executable, "-m", "tests.distributed.fit_script", json.dumps(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == (KILLED if config.get("die") else 0), done.stderr[-3000:]
    return done.stderr


def results(out, strategy):
    return [torch.load(out / f"rank{rank}.pt") for rank in range(STRATEGIES[strategy][1])]


def run(folder, out, strategy, **kwargs):
    start(folder, out, strategy, **kwargs)
    return results(out, strategy)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """(strategy, lora) -> results of each rank, made once."""
    made = {}

    def get(strategy, *, prune_only):
        key = strategy, prune_only
        if key not in made:
            made[key] = run(folder, tmp_path_factory.mktemp("undisturbed"), strategy, prune_only=prune_only)
        return made[key]

    return get


@pytest.mark.parametrize("prune_only", [True, False], ids=["prune", "prune_and_lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_agree(undisturbed, strategy, prune_only):
    alone = undisturbed("single", prune_only=True)[0]
    ranks = undisturbed(strategy, prune_only=prune_only)
    for rank in ranks:
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])  # to the last bit
        assert equal(rank["weights"], ranks[0]["weights"])
    if prune_only:
        assert equal(ranks[0]["weights"], alone["weights"])
    else:
        assert ranks[0]["steps"] == 8 // len(ranks)  # 8 sequences, 2 a step on each rank, 2 epochs
        assert any(weight.any() for name, weight in ranks[0]["weights"].items() if "lora_B" in name)


def test_sharded_training_is_ddp_training(undisturbed):
    """The same steps on whole and on sharded weights, bit for bit; no FSDP2 rank holds more than its share."""
    ddp, fsdp2 = (undisturbed(name, prune_only=False)[0] for name in ("ddp", "fsdp2"))
    assert equal(ddp["weights"], fsdp2["weights"])
    assert fsdp2["local"] <= 0.52 * ddp["local"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prune_only_resumes(folder, tmp_path, undisturbed, strategy):
    start(folder, tmp_path, strategy, prune_only=True, die=["calibration", 2])
    said = start(folder, tmp_path, strategy, prune_only=True, ckpt_path="last")
    assert "Resumed calibration after" in said
    for rank, expected in zip(results(tmp_path, strategy), undisturbed(strategy, prune_only=True), strict=True):
        assert rank["keep"] == expected["keep"]
        assert equal(rank["scores"], expected["scores"])
        assert equal(rank["weights"], expected["weights"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fit_resumes_at_every_stage(folder, tmp_path, undisturbed, strategy):
    """Killed in the middle of calibration, before the first step, and in the middle of each epoch of recovery."""
    for moment in (["calibration", 2], ["pruned", 0], ["recovery", 1], ["recovery", 3]):
        start(folder, tmp_path, strategy, die=moment, ckpt_path="last")
    start(folder, tmp_path, strategy, ckpt_path="last")
    for rank, expected in zip(results(tmp_path, strategy), undisturbed(strategy, prune_only=False), strict=True):
        assert rank["keep"] == expected["keep"]
        assert rank["steps"] == expected["steps"]
        assert equal(rank["weights"], expected["weights"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert saved.config.intermediate_size == len(next(iter(expected["keep"].values())))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert list(report["stages"]) == ["dense", "pruned", "recovered"]
    assert not (tmp_path / "checkpoints/last-pruning.ckpt").exists()
