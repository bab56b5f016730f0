"""What ``tests.helpers.warm`` says of runs that fail, leave, hang or are late."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import warm


def rank(ways, folder):
    number = int(os.environ.get("LOCAL_RANK", "0"))
    print("out of", number, Path.cwd() == Path(folder), threading.active_count(), torch.get_num_threads())
    way = ways[number]
    if way == "raise":
        raise ValueError("said by a child")
    if way == "hang":
        time.sleep(600)
    if isinstance(way, int):
        os._exit(way)
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def run(ways, folder, **kwargs):
    target = f"{__name__}:{rank.__name__}"
    return warm.run(target, ranks=len(ways), cwd=folder, ways=ways, folder=str(folder), **kwargs)


@pytest.mark.parametrize(
    ("ways", "status"),
    [
        (["end"], 0),
        (["raise"], 1),
        ([9], 9),
        (["kill"], -signal.SIGKILL),
        (["end", "end"], 0),
        (["end", "raise"], 1),
        (["raise", "hang"], 1),
        (["hang", 9], 9),
        (["raise", 9], 9),
    ],
)
def test_the_status_is_that_of_the_process_that_failed(ways, status, tmp_path):
    done = run(ways, tmp_path, grace=0.1 if "hang" in ways else warm.GRACE)  # a busy machine ends the others late
    assert done.returncode == status
    assert ("ValueError: said by a child" in done.stderr) == ("raise" in ways)
    if set(ways) == {"end"}:
        assert sorted(done.stdout.splitlines()) == [f"out of {number} True 1 1" for number in range(len(ways))]


def test_late_ones_are_killed_and_the_next_run_is_answered(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run(["hang", "end"], tmp_path, timeout=0.5)
    assert run([3], tmp_path).returncode == 3
