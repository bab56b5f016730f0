"""Ctrl-C in a command: one line, exit status 130, nothing half-written; the same command works again."""

import json
import re
from pathlib import Path

import pytest

from hfprune.cli import main
from tests.helpers import warm
from tests.helpers.models import save_tiny
from tests.helpers.runs import TINY_FLAGS

pytestmark = pytest.mark.usefixtures("undrawn")

NEVER = 10**9
WORDS = "\n\n".join(
    f"the assert statement {n} is a part of the language and so is while, for and in: it" for n in range(40)
)
FIT = ["--data.batch_size=2", "--data.recovery_sequences=8", "--data.validation_sequences=2", "--checkpoint_steps=1"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "dense"))


@pytest.fixture
def command(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text(WORDS)
    given = {"prune": [], "fit": ["--data.recovery=words.txt", *FIT]}

    def build(name):
        return [name, dense, "--ratio=0.2", "-o", "out", *given[name], *TINY_FLAGS]

    return build


def interrupted(args, passes, **settings):
    """Returns what a command with Ctrl-C writes to standard error, without its progress."""
    done = warm.run("tests.helpers.interrupts:main", cwd=Path.cwd(), args=[*args, "--quiet"], passes=passes, **settings)
    assert done.returncode == 130, done.stderr
    return done.stderr.splitlines()


def files(folder="out"):
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["prune", "fit"])
def test_in_calibration_the_same_command_works_again(command, name):
    args = command(name)
    assert interrupted(
        args, passes=4
    )  # two windows of the dense model, then calibration == [f"hfprune {name}: interrupted."]
    assert files() == []
    assert main([*args, "--quiet"]) == 0
    assert json.loads(Path("out/report.json").read_text())["plan"]["budget"]["params"] > 0


def test_in_recovery_the_run_goes_on(command):
    args = command("fit")
    (line,) = interrupted(args, passes=3, training=True)
    step = re.match(
        r"hfprune fit: interrupted\. Continue from out/checkpoints/step-(\d)\.ckpt \(step \1, epoch 0\)", line
    )
    assert line.endswith(" --ckpt_path last")
    assert not [name for name in files() if name.startswith(("out/model", "out/report", "out/figures"))]
    assert main([*args, "--quiet"]) == 2  # what was done is not lost by the same command
    assert main([*args, "--quiet", "--ckpt_path", "last"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert f"step-{step[1]}.ckpt" in json.dumps(report["resumed"])
    assert {"dense", "pruned", "recovered"} <= report["stages"].keys()
