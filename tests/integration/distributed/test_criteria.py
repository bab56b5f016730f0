"""Criteria of a forward pass, of moments, of sampled labels and of two stages: two gloo processes against one."""

import pytest
import torch

from tests.integration.distributed.runs import equal, results, run, start

SLOW = pytest.mark.slow
ALONE = {"prune_only": True, "report": False, "sequences": 5}


@pytest.mark.parametrize(
    ("strategy", "criterion"),
    [
        ("ddp", "Fisher"),
        ("fsdp2", "WandaStructured"),
        pytest.param("ddp", "WandaStructured", marks=SLOW),
        pytest.param("fsdp2", "Fisher", marks=SLOW),
        pytest.param("fsdp2", "VectorTaylor", marks=SLOW),
        pytest.param("ddp", "SlimLLMChannels", marks=SLOW),
        pytest.param("fsdp2", "SlimLLMChannels", marks=SLOW),
    ],
)
def test_two_processes_score_as_one(folder, tmp_path, strategy, criterion):
    (alone,) = run(folder, tmp_path / "one", "single", criterion=criterion, **ALONE)
    for rank in run(folder, tmp_path / "two", strategy, criterion=criterion, **ALONE):
        assert rank["keep"] == alone["keep"]
        for name, score in alone["scores"].items():  # rows to the last bit, moments to rounding
            tolerance = 1e-12 if criterion == "SlimLLMChannels" else 0
            torch.testing.assert_close(rank["scores"][name], score, rtol=tolerance, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=SLOW)])
def test_two_stages_on_two_processes_resumed_in_the_second(folder, tmp_path, strategy):
    settings = {"criterion": "CoupledTaylor", "distil": True, **ALONE}
    (alone,) = run(folder, tmp_path / "one", "single", **settings)
    start(folder, tmp_path / "two", strategy, die=["calibration", 4], **settings)  # 3 steps a stage on the first rank
    said = start(folder, tmp_path / "two", strategy, ckpt_path="last", **settings)
    assert "Resumed calibration at" in said
    for rank in results(tmp_path / "two", strategy):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])
