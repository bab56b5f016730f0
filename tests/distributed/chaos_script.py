"""Kills runs with SIGKILL at random moments and resumes them until they end. Run as a process of its own, one thread.

    python -m tests.distributed.chaos_script MODEL OUT KILLS SEED

Everything is imported once; each life of a run is a fork. Prints one JSON line: what each life had reached when it was
killed, and the folders of the runs that ended.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.distributed.fit_script import main as fit

FOREVER = 600  # seconds
SETTINGS = {"sequences": 12, "calibration_batch_size": 2, "dtype": "float32"}


def live(model, out, seconds):
    """Starts or resumes the run in a child; returns whether it ended before ``seconds`` had passed."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        fit(model=model, out=str(out), ckpt_path="last", **SETTINGS)
        os._exit(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"the run failed by itself: {status}"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def reached(out):
    """Returns how far the checkpoints of a run have come."""
    folder = out / "checkpoints"
    files = sorted(folder.glob("*.ckpt"), key=lambda f: f.stat().st_mtime) if folder.is_dir() else []
    if not files:
        return "nothing"
    checkpoint = torch.load(files[-1], weights_only=True)  # whole, or this raises
    record = checkpoint["hfprune"]
    if record["phase"] == "calibrating":
        return f"sequence {record['calibration']['position']}"
    return f"step {checkpoint['global_step']}"


def main(model, out, kills, seed):
    torch.set_num_threads(1)
    generator = random.Random(int(seed))
    kills, out = int(kills), Path(out)
    assert live(model, out / "warmup", FOREVER)  # the first life of all reads and compiles more than the others
    start = time.monotonic()
    assert live(model, out / "undisturbed", FOREVER)
    horizon = time.monotonic() - start
    moments, runs = [], []
    while len(moments) < kills:
        run, lives, stuck, start = out / f"run{len(runs)}", 1, 0, time.monotonic()
        while not live(model, run, generator.uniform(0.0, 0.7 * horizon) if len(moments) < kills else FOREVER):
            moments.append(reached(run))
            lives += 1
            # On a machine that became slower, lives are too short to get anywhere; on one that became faster, too long.
            stuck = stuck + 1 if moments[-1] in moments[-2:-1] else 0
            horizon *= 1.5 if stuck >= 3 else 1.0
        if lives == 1:
            horizon = min(horizon, time.monotonic() - start)
        runs.append(str(run))
    print(json.dumps({"moments": moments, "runs": runs, "undisturbed": str(out / "undisturbed")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
