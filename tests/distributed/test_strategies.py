"""One process, DDP and FSDP2 on two gloo processes: the same kept units, equal ranks, and runs that can be resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune import apply_plan, load
from hfprune.layouts import is_per_layer
from tests.layouts.plans import mlp_plan
from tests.models import save_tiny, tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
KILLED = 9
STRATEGIES = {"single": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
MORE = {"fsdp2_alone": ("fsdp2", 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def start(folder, out, strategy, *, fails=False, **kwargs):
    name, devices = (STRATEGIES | MORE)[strategy]
    config = {"model": folder, "out": str(out), "strategy": name, "devices": devices} | kwargs
    command = [sys.executable, "-m", "tests.distributed.fit_script", json.dumps(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    expected = 1 if fails else KILLED if config.get("die") else 0
    assert done.returncode == expected, done.stderr[-3000:]
    return done.stderr


def results(out, strategy):
    return [torch.load(out / f"rank{rank}.pt") for rank in range((STRATEGIES | MORE)[strategy][1])]


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


def test_heads_and_layers_under_every_strategy(folder, tmp_path):
    settings = {"units": ["mlp", "heads", "blocks"], "pruning_ratio": 0.5}
    alone = run(folder, tmp_path / "single", "single", prune_only=True, **settings)[0]
    assert sorted({len(keep) for keep in alone["keep"].values()}) == [1, 2, 17, 24]  # 24, 2: of the layer that goes
    for strategy in ("ddp", "fsdp2"):
        for rank in run(folder, tmp_path / strategy, strategy, prune_only=True, **settings):
            assert rank["keep"] == alone["keep"]
            assert equal(rank["scores"], alone["scores"])
            assert equal(rank["weights"], alone["weights"])


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


def test_module_of_ones_own_under_ddp(folder, tmp_path):
    """The same kept units from one process and from two, also when two take up what one left in mid-calibration."""
    (alone,) = run(folder, tmp_path / "one", "single", foreign=True)
    ranks = run(folder, tmp_path / "two", "ddp", foreign=True)
    start(folder, tmp_path / "both", "single", foreign=True, die=["calibration", 2])
    resumed = run(folder, tmp_path / "both", "ddp", foreign=True, ckpt_path="last")
    for rank in (*ranks, *resumed):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])
        assert equal(rank["weights"], ranks[0]["weights"])


SLOW = pytest.mark.slow


@SLOW
def test_layers_that_differ_in_width(tmp_path):
    """Read, pruned further, adapted and written shard by shard: what one process does, with both plans beside it."""
    model = tiny(dtype=torch.float32)
    apply_plan(model, mlp_plan(model))
    model.save_pretrained(tmp_path / "ragged")
    tiny_tokenizer().save_pretrained(tmp_path / "ragged")
    settings = {"layout": "per_layer", "allow_pruned": True, "prune_only": True}
    found = {}
    for strategy in ("single", "fsdp2"):
        ranks = run(str(tmp_path / "ragged"), tmp_path / strategy, strategy, **settings)
        found[strategy] = ranks[0]["weights"], load(tmp_path / strategy / "run/model", dtype="float64")
    assert equal(found["single"][0], found["fsdp2"][0])
    for weights, saved in found.values():
        assert equal(
            {name: weights[f"model.{name}"] for name, _ in saved.named_parameters()}, dict(saved.named_parameters())
        )
        assert is_per_layer(saved.config)
    said = start(str(tmp_path / "ragged"), tmp_path / "no", "fsdp2", fails=True, **settings | {"layout": "padded"})
    assert "--layout padded needs the whole model on one rank" in said


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(("ddp", "single", "ddp"), id="ddp-single-ddp"),
        pytest.param(("single", "fsdp2", "fsdp2_alone"), id="single-fsdp2-fsdp2", marks=SLOW),
        pytest.param(("fsdp2", "ddp", "ddp"), id="fsdp2-ddp-ddp", marks=SLOW),
    ],
)
def test_another_number_of_processes_takes_over(folder, tmp_path, undisturbed, chain):
    """In the middle of calibration, and in the middle of recovery, whose steps then are of another size."""
    start(folder, tmp_path, chain[0], die=["calibration", 1])
    said = start(folder, tmp_path, chain[1], die=["recovery", 1], ckpt_path="last")
    assert "Resumed calibration after" in said
    ranks = run(folder, tmp_path, chain[2], ckpt_path="last")
    expected = undisturbed("single", prune_only=True)[0]
    for rank in ranks:
        assert rank["keep"] == expected["keep"]
        assert equal(rank["weights"], ranks[0]["weights"])


def test_shards_of_weights_need_a_sharded_strategy(folder, tmp_path):
    start(folder, tmp_path, "fsdp2", die=["recovery", 1])
    said = start(folder, tmp_path, "single", ckpt_path="last", fails=True)
    assert "holds weights in shards: resume it under ModelParallelStrategy" in said


@pytest.fixture(scope="module")
def ragged_alone(folder, tmp_path_factory):
    settings = {"prune_only": True, "report": False, "ragged": [1, "right"]}
    (found,) = run(folder, tmp_path_factory.mktemp("ragged"), "single", **settings)
    return found


@pytest.mark.parametrize(
    ("strategy", "ragged"),
    [
        ("ddp", [4, "left"]),
        ("fsdp2", [3, "right"]),
        pytest.param("fsdp2", [11, "packed"], marks=SLOW),
        pytest.param("ddp", [11, "packed"], marks=SLOW),
    ],
)
def test_ragged_sequences_in_uneven_shards(folder, tmp_path, ragged_alone, strategy, ragged):
    """Acceptance test 3 on two ranks, one by one and in batches: 11 sequences, so that one rank always has less to do."""
    alone = ragged_alone
    for exact in (True, False):
        settings = {"prune_only": True, "report": False, "exact": exact}
        for rank in run(folder, tmp_path / f"two{exact}", strategy, ragged=ragged, **settings):
            assert rank["keep"] == alone["keep"]
            for name, score in alone["scores"].items():
                torch.testing.assert_close(rank["scores"][name], score, atol=0 if exact else 1e-10, rtol=0)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=SLOW), "fsdp2"])
def test_fewer_sequences_than_ranks(folder, tmp_path, strategy):
    (alone,) = run(folder, tmp_path / "one", "single", prune_only=True, sequences=1, report=False)
    for rank in run(folder, tmp_path / "two", strategy, prune_only=True, sequences=1, report=False):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])


@SLOW
def test_plain_trainer_resumes_a_sharded_run(folder, tmp_path, undisturbed):
    """Lightning tells no callback which checkpoint it will restore: calibration runs again, and must agree."""
    start(folder, tmp_path, "fsdp2", die=["recovery", 1])
    ranks = run(folder, tmp_path, "fsdp2", plain_trainer=True, ckpt_path="last")
    for rank, expected in zip(ranks, undisturbed("fsdp2", prune_only=False), strict=True):
        assert equal(rank["weights"], expected["weights"])
