"""Kills commands with SIGKILL at seeded moments and gives them again until they end. Run by ``tests.helpers.warm``.

Prints one JSON line: for each command how many lives were killed, how many runs ended with the bits of one that was left
alone, and the lines with which others stopped.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

from hfprune.cli import main as hfprune

LIVES = 4
"""At most so many kills of one run."""
SMALL = ["--data.seq_len=16", "--data.calibration_sequences=6", "--data.eval_window=16", "--data.eval_windows=2"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def commands(dense, text, pruned):
    """Command -> its arguments, what is added to go on after a kill, and the files that must have equal bits."""
    run = [*SMALL, f"--model.path={dense}", "--latency=false"]
    fit = ["fit", *run, "--pruning_ratio=0.2", f"--data.recovery={text}", "--checkpoint_steps=1"]
    fit += ["--data.batch_size=2", "--data.recovery_sequences=8", "--data.validation_sequences=2"]
    sparse = ["prune", *run, "--method=wanda", "--sparsity=0.5"]
    sweep = ["sweep", *run, f"--texts={json.dumps({'words': str(text)})}", "--pruning_ratios=[0.2]"]
    export = ["export", f"--model.path={pruned}", "--layout=padded", "--overwrite=true"]
    model = ["model/model.safetensors", "model/config.json"]
    return {
        "fit": (fit, ["--ckpt_path=last"], model),
        "sparse": (sparse, ["--ckpt_path=last"], model),
        "sweep": (sweep, [], ["table.csv"]),
        "export": (export, [], ["model.safetensors", "config.json", "plan.json"]),
    }


def live(args, seconds, log):
    """Runs a command in a child, for ``seconds`` at most; returns its exit status, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        with contextlib.suppress(BaseException):
            status = hfprune(args)
        os._exit(status)
    until = time.monotonic() + seconds
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def bits(out, names):
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


def hidden(out):
    return [str(path) for path in out.parent.rglob(".*") if path.name.endswith(".hfprune")]


def killed(command, given, more, names, root, kills, draw):
    """Kills one command so many times; returns what became of its runs."""
    log = root / "log"
    start = time.monotonic()
    assert live([*given, f"--output_dir={root / 'alone'}"], 600, log) == 0, log.read_text()
    seconds, expected = time.monotonic() - start, bits(root / "alone", names)
    found = {"kills": 0, "equal": 0, "stopped": [], "seconds": round(seconds, 2)}
    number = 0
    while found["kills"] < kills:
        number += 1
        folder = root / f"run{number}"
        out = folder / "out"
        folder.mkdir()
        (folder / "mine").write_text("mine")
        args = [*given, f"--output_dir={out}"]
        for life in range(LIVES + 1):
            last = life == LIVES or found["kills"] == kills
            status = live(args, 600 if last else draw.uniform(0.02, 0.8) * seconds, log)
            args = [*given, f"--output_dir={out}", *more]
            if status != -signal.SIGKILL:
                break
            found["kills"] += 1
        text = log.read_text()
        assert "Traceback" not in text, text
        assert (folder / "mine").read_text() == "mine"
        if status == 2:
            found["stopped"].append(next(line for line in text.splitlines() if "error:" in line))
        else:
            assert status == 0, text
            assert bits(out, names) == expected, (command, number)
            assert not [path for path in hidden(out) if os.stat(path).st_mtime < time.time() - 60]
            found["equal"] += 1
        shutil.rmtree(folder)
    return found


def main(dense, text, root, kills, seed):
    """Kills four commands, a quarter of ``kills`` each."""
    root, draw = Path(root), random.Random(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        pruned = root / "pruned"
        assert (
            live(
                [
                    "prune",
                    f"--model.path={dense}",
                    f"--output_dir={pruned}",
                    "--pruning_ratio=0.3",
                    "--latency=false",
                    *SMALL,
                ],
                600,
                root / "log",
            )
            == 0
        ), (root / "log").read_text()
    found = {}
    for command, (given, more, names) in commands(dense, Path(text), pruned / "model").items():
        (root / command).mkdir()
        found[command] = killed(command, given, more, names, root / command, kills // 4, draw)
    print(json.dumps(found))
