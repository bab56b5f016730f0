"""Runs under every strategy that are killed and resumed, also with another number of processes."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.distributed.runs import STRATEGIES, equal, results, run, start

SLOW = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["single", pytest.param("ddp", marks=SLOW), "fsdp2"])
def test_prune_only_resumes(folder, tmp_path, undisturbed, strategy):
    start(folder, tmp_path, strategy, prune_only=True, die=["calibration", 2])
    said = start(folder, tmp_path, strategy, prune_only=True, ckpt_path="last")
    assert "Resumed calibration at" in said
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
    assert "Resumed calibration at" in said
    ranks = run(folder, tmp_path, chain[2], ckpt_path="last")
    expected = undisturbed("single", prune_only=True)[0]
    for rank in ranks:
        assert rank["keep"] == expected["keep"]
        assert equal(rank["weights"], ranks[0]["weights"])


def test_shards_of_weights_need_a_sharded_strategy(folder, tmp_path):
    start(folder, tmp_path, "fsdp2", die=["recovery", 1])
    said = start(folder, tmp_path, "single", ckpt_path="last", fails=True)
    assert "has sharded weights: resume it under ModelParallelStrategy" in said


@SLOW
def test_plain_trainer_resumes_a_sharded_run(folder, tmp_path, undisturbed):
    """Lightning tells no callback which checkpoint it will restore: calibration runs again, and must agree."""
    start(folder, tmp_path, "fsdp2", die=["recovery", 1])
    ranks = run(folder, tmp_path, "fsdp2", plain_trainer=True, ckpt_path="last")
    for rank, expected in zip(ranks, undisturbed("fsdp2", prune_only=False), strict=True):
        assert equal(rank["weights"], expected["weights"])
