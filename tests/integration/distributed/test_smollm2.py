"""The strategies on a real model: minutes, so in the slow tier."""

import pytest

from hfprune.io.demo_model import EMBEDDED_NAME
from tests.integration.distributed.runs import equal, results, run, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SETTINGS = {"dtype": "float32", "seq_len": 64, "sequences": 5, "report": False}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (found,) = run(EMBEDDED_NAME, tmp_path_factory.mktemp("alone"), "single", prune_only=True, **SETTINGS)
    return found


@pytest.mark.parametrize("prune_only", [True, False], ids=["prune", "prune_and_lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_agree_with_one_and_resume(tmp_path, alone, strategy, prune_only):
    settings = SETTINGS | {"prune_only": prune_only}
    undisturbed = run(EMBEDDED_NAME, tmp_path / "undisturbed", strategy, **settings)
    start(EMBEDDED_NAME, tmp_path / "killed", strategy, die=["calibration", 2], **settings)
    if not prune_only:
        start(EMBEDDED_NAME, tmp_path / "killed", strategy, die=["recovery", 2], ckpt_path="last", **settings)
    said = start(EMBEDDED_NAME, tmp_path / "killed", strategy, ckpt_path="last", **settings)
    assert "Resumed" in said
    for rank, expected in zip(results(tmp_path / "killed", strategy), undisturbed, strict=True):
        assert expected["keep"] == rank["keep"] == alone["keep"]
        assert equal(expected["scores"], alone["scores"])  # float32, to the last bit
        assert equal(rank["weights"], expected["weights"])
        assert equal(rank["weights"], undisturbed[0]["weights"])
    if prune_only:
        assert equal(undisturbed[0]["weights"], alone["weights"])
