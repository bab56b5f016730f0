"""Commands killed with SIGKILL at seeded moments and given again: equal bits, or one line."""

import json

import pytest

from tests.helpers import warm
from tests.helpers.models import save_tiny

WORDS = "\n\n".join(
    f"the assert statement {n} is a part of the language and so is while, for and in: it" for n in range(40)
)


def outcome(tmp_path, kills, timeout):
    (tmp_path / "words.txt").write_text(WORDS)
    dense = save_tiny(tmp_path / "dense")
    (tmp_path / "runs").mkdir()
    settings = {"dense": str(dense), "text": str(tmp_path / "words.txt"), "root": str(tmp_path / "runs"), "seed": 7}
    done = warm.run("tests.helpers.kills:main", timeout=timeout, kills=kills, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    for command, one in found.items():
        assert one["kills"] == kills // 4, command
        assert one["equal"] >= 1, command
        assert all(line.startswith("hfprune ") for line in one["stopped"])


def test_killed_commands_go_on(tmp_path):
    outcome(tmp_path, kills=8, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_killed_a_hundred_times_go_on(tmp_path):
    outcome(tmp_path, kills=100, timeout=1700)
