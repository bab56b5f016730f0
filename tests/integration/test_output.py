"""What a command writes: lines during a run, the block at its end, JSON, nothing."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hfprune.cli import main
from tests.helpers.runs import EVALUATE_FLAGS, TINY_DATA_FLAGS

pytestmark = pytest.mark.usefixtures("empty_folder")

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (*TINY_DATA_FLAGS, "--latency=false", "--trainer.accelerator=cpu", "--pruning_ratio=0.2")
CHILD = """
import sys
sys.path[:0] = [{root!r}]
import matplotlib.figure
matplotlib.figure.Figure.savefig = lambda *args, **kwargs: None
import hfprune.utils.progress
hfprune.utils.progress.INTERVAL = 0.01
from hfprune.callbacks.recovery_progress import RecoveryLines
after = RecoveryLines.on_train_batch_end
def waiting(self, trainer, *args, **kwargs):
    after(self, trainer, *args, **kwargs)
    if trainer.global_step == 1:
        sys.stdin.readline()  # the run goes on when its reader has seen the line
RecoveryLines.on_train_batch_end = waiting
from hfprune.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_piped_fit_writes_its_lines_while_it_runs(dense):
    """The run waits within recovery until its line was read: lines that are kept back until the end never arrive."""
    args = ["fit", f"--model.path={dense}", "--output_dir=out", "--data.recovery_sequences=16", *FLAGS]
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", CHILD.format(root=str(ROOT)), *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        for line in child.stderr:
            lines.append(line.rstrip())
            if "recovering: step 1/2" in line and not child.stdin.closed:
                child.stdin.close()
        out = child.stdout.read()
    assert child.returncode == 0, lines
    phases = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
    assert [name for name in phases if name != "validating"] == [
        "loading the model", "measuring the dense model", "calibrating", "fitting layer by layer", "pruning", "measuring the pruned model",
        "recovering", "measuring the recovered model", "saving", "checking the reload",
    ]  # fmt: skip
    step = next(line for line in lines if line.startswith("recovering: step 1/2"))
    assert all(part in step for part in ("loss ", "lr ", "tokens/s", "left"))
    assert "Removed: 1,440 of 6,848 parameters (21.0 %); MLP width 24 to 14" in out
    assert "\x1b" not in out + "".join(lines)


@pytest.mark.usefixtures("undrawn")
def test_the_block_at_the_end(dense, capsys):
    args = ["prune", f"--model.path={dense}", "--output_dir=out", *FLAGS]
    assert main(args) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("out/report.json").read_text())
    pruned = report["stages"]["pruned"]
    block = out[out.index("Removed:") :]
    assert "1,440 of 6,848 parameters" in block
    assert f"{pruned['perplexity']['value']:.2f} pruned" in block
    assert f"KL to dense {pruned['fidelity']['kl']:.4f}" in block
    assert "out/report.html, out/model/" in block
    assert f"hfprune evaluate out --dense {dense}" in block
    assert f"hfprune fit {dense} " in block
    assert "-o out-recovered --data.recovery FILE" in block
    assert {"calibrating", "pruning", "saving"} <= report["timing"].keys()


@pytest.mark.usefixtures("undrawn")
def test_json_alone_is_on_stdout(dense, capsys):
    fit = ["fit", f"--model.path={dense}", "--output_dir=out", "--data.recovery_sequences=16", *FLAGS]
    assert main([*fit, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out, parse_constant=pytest.fail)
    assert found == json.loads(Path("out/report.json").read_text())
    assert "Removed:" in captured.err
    assert [step for step, *_ in found["training"]["train"]] == [1, 2]
    assert [tokens for _, tokens, _ in found["training"]["train"]] == [128, 256]
    assert all(loss > 0 for *_, loss in found["training"]["train"])
    assert [step for step, *_ in found["training"]["validation"]] == [2]
    page = Path("out/report.html").read_text()
    assert all(f'id="{name}"' in page for name in ("figure-training_curve", "timing", "recipe"))
    assert main(["evaluate", "out", *EVALUATE_FLAGS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["model"]["parameters"] == 5408
    assert main(["export", "--model.path=out/model", "--output_dir=other", "--layout=per_layer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "per_layer"


@pytest.mark.usefixtures("undrawn")
def test_quiet_writes_nothing_and_verbose_more(dense, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's: the command configures logging itself
    prune = ["prune", f"--model.path={dense}", *FLAGS]
    assert main([*prune, "--output_dir=quiet", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path("quiet/model/config.json").is_file()
    assert main([*prune, "--output_dir=verbose", "--verbose"]) == 0
    assert "calibrating: done in " in capsys.readouterr().err
    assert main([*prune, "--output_dir=quiet", "--quiet"]) == 2  # errors are written
    assert "error:" in capsys.readouterr().err
