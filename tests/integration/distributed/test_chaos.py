"""A run killed with SIGKILL at random moments, and resumed each time, ends as one that was left alone."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import warm
from tests.helpers.models import save_tiny

KILLS = 24


@pytest.mark.slow  # the default tests kill runs in test_kills.py and in distributed/test_resume.py
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    folder = save_tiny(tmp_path / "dense")
    script = "tests.integration.distributed.chaos_script:main"
    done = warm.run(script, timeout=280, model=folder, out=str(tmp_path), kills=KILLS, seed=1)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["moments"]) >= KILLS
    kinds = {moment.split()[0] for moment in found["moments"]}
    assert {"sequence", "step"} <= kinds, found["moments"]  # it was hit within calibration and within recovery
    expected = torch.load(Path(found["undisturbed"]) / "rank0.pt")
    for run in found["runs"]:
        result = torch.load(Path(run) / "rank0.pt")
        assert result["keep"] == expected["keep"]
        assert result["steps"] == expected["steps"]
        for name, weight in expected["weights"].items():
            assert torch.equal(result["weights"][name], weight), (run, name)
        saved = (Path(run) / "run/model/model.safetensors").read_bytes()
        assert saved == (Path(found["undisturbed"]) / "run/model/model.safetensors").read_bytes()
        assert not list((Path(run) / "checkpoints").glob("last-pruning*"))
