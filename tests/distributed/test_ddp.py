"""Two gloo processes give the scores of one, and equal ranks after recovery."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def run(folder, out, devices, sequences):
    command = [sys.executable, "-m", "tests.distributed.fit_script", folder, str(out), str(devices), str(sequences)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(devices)]


@pytest.mark.parametrize("sequences", [5, 1], ids=["uneven", "fewer_than_ranks"])
def test_two_processes_score_and_prune_as_one(folder, tmp_path, sequences):
    (alone,) = run(folder, tmp_path / "one", 1, sequences)
    ranks = run(folder, tmp_path / "two", 2, sequences)
    for rank in ranks:
        assert rank["keep"] == alone["keep"]
        for name, score in alone["scores"].items():
            torch.testing.assert_close(rank["scores"][name], score, atol=1e-10, rtol=0)
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name
    assert ranks[0]["steps"] == 2  # 8 sequences, 2 a step on each of 2 ranks
    trained = [n for n in ranks[0]["weights"] if "lora_B" in n]
    assert any(ranks[0]["weights"][n].any() for n in trained)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two/run/model")
    assert model.config.intermediate_size == len(next(iter(alone["keep"].values())))
