"""Sparse pruning by one process and by two: the same bits, also when a run was killed and another number takes over."""

from functools import partial

import pytest

from tests.integration.distributed import runs
from tests.integration.distributed.runs import equal

start = partial(runs.start, script="sparse_script")
run = partial(runs.run, script="sparse_script")


@pytest.mark.parametrize(
    "sparse",
    [
        {"method": "wanda", "sparsity": "2:4", "update": "sparsegpt"},
        pytest.param({"method": "sparsegpt", "sparsity": 0.5}, marks=pytest.mark.slow),
        pytest.param({"method": "taylor", "sparsity": 0.5}, marks=pytest.mark.slow),
    ],
    ids=lambda s: s["method"],
)
def test_one_process_two_processes_and_those_that_take_over(folder, tmp_path, sparse):
    (alone,) = run(folder, tmp_path / "one", "single", sparse=sparse)
    for rank in run(folder, tmp_path / "two", "ddp", sparse=sparse, calibration_batch_size=4):
        assert equal(rank["weights"], alone["weights"])
        assert rank["errors"] == alone["errors"]
    start(folder, tmp_path / "killed", "ddp", sparse=sparse, die={"layers": 1})
    (resumed,) = run(folder, tmp_path / "killed", "single", sparse=sparse, calibration_batch_size=3)
    assert resumed["resumed"] == [True, False, False]
    assert not resumed["left"]
    assert equal(resumed["weights"], alone["weights"])
    assert resumed["errors"] == alone["errors"]


@pytest.mark.slow
def test_killed_in_recovery_and_resumed(folder, tmp_path):
    sparse = {"method": "wanda", "sparsity": "2:4"}
    (expected,) = run(folder, tmp_path / "a", "single", sparse=sparse, lora=True)
    start(folder, tmp_path / "b", "single", sparse=sparse, lora=True, die={"step": 3})
    (resumed,) = run(folder, tmp_path / "b", "single", sparse=sparse, lora=True, ckpt_path="last")
    assert resumed["errors"] == []
    assert equal(resumed["weights"], expected["weights"])
    other = {"method": "wanda", "sparsity": 0.5}
    said = start(folder, tmp_path / "b", "single", sparse=other, lora=True, ckpt_path="last", fails=True)
    assert "The checkpoint was pruned with" in said
