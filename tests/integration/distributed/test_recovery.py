"""Recovery by one process and by two: LoRAPrune, and the dense model's predictions on disk."""

from functools import partial

import pytest
import torch

from tests.integration.distributed import runs
from tests.integration.distributed.runs import equal

run = partial(runs.run, script="recovery_script")


def compare(alone, ranks, *, atol):
    first, second = ranks
    assert first["keep"] == second["keep"] == alone["keep"]
    assert equal(first["weights"], second["weights"])
    for name, parameter in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], parameter, atol=atol, rtol=0)


def test_lora_prune_keeps_the_same_units(folder, tmp_path):
    (alone,) = run(folder, tmp_path / "one", "single")
    ranks = run(folder, tmp_path / "two", "ddp")
    compare(alone, ranks, atol=1e-5)  # adapters are float32
    for name, scores in alone["importance"].items():
        torch.testing.assert_close(ranks[0]["importance"][name], scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(ranks[0]["importance"][name], ranks[1]["importance"][name])


@pytest.mark.slow
def test_ranks_fill_one_cache_together(folder, tmp_path):
    cache = tmp_path / "cache"
    ranks = run(folder, tmp_path / "two", "ddp", way="cache", cache=str(cache))
    files = list(cache.rglob("rows-*.safetensors"))
    assert len(files) == 2  # one of each
    (alone,) = run(folder, tmp_path / "one", "single", way="cache", cache=str(cache))
    assert list(cache.rglob("rows-*.safetensors")) == files  # nothing was missing
    compare(alone, ranks, atol=1e-5)
