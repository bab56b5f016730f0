"""The dense model's predictions on disk, written by two processes that are killed within it."""

import pytest
from safetensors.torch import load_file

from tests.integration.distributed.runs import equal, results, run, start


def settings(folder):
    return {"teacher": {"alpha": 0.5, "cache": str(folder), "top_k": 8}, "report": False}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("rows-*.safetensors")}


@pytest.mark.slow
def test_killed_while_they_write_they_go_on_with_the_rest(folder, tmp_path):
    expected = run(folder, tmp_path / "a", "ddp", **settings(tmp_path / "straight"))
    assert equal(expected[0]["weights"], expected[1]["weights"])
    start(folder, tmp_path / "b", "ddp", die=["teacher", 1], **settings(tmp_path / "killed"))
    begun = files(tmp_path / "killed")
    assert len(begun) in (1, 2)  # the first to leave may take the other along
    start(folder, tmp_path / "b", "ddp", ckpt_path="last", **settings(tmp_path / "killed"))
    for rank, theirs in zip(results(tmp_path / "b", "ddp"), expected, strict=True):
        assert equal(rank["weights"], theirs["weights"])
        assert rank["steps"] == theirs["steps"]
    assert begun.items() < files(tmp_path / "killed").items()
    rows = [
        sorted(name for path in files(tmp_path / part) for name in load_file(path)) for part in ("straight", "killed")
    ]
    assert rows[0] == rows[1] == sorted(set(rows[0]))  # none twice
