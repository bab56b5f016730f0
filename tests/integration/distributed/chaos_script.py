"""Kills runs with SIGKILL at random moments and resumes them until they end. Run by ``tests.helpers.warm``.

Each life of a run is a fork. Prints one JSON line: what each life had reached when it was
killed, and the folders of the runs that ended.
"""

import json
import os
import random
import select
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from hfprune.pruning.accumulator import ImportanceAccumulator
from tests.integration.distributed.fit_script import main as fit

FOREVER = 600  # seconds
SCRIPTED = [23, 2, 2, 2]
"""Beats of the first lives: to the last batch of the first epoch, then a batch at a time (Lightning miscounts there)."""
SETTINGS = {"sequences": 12, "calibration_batch_size": 2, "dtype": "float32"}


class Beat(Callback):
    """Writes one byte at every calibration batch, every training batch, every checkpoint and the end of training."""

    def __init__(self, pipe):
        self.pipe, original = pipe, ImportanceAccumulator.step

        def step(accumulator, *args, **kwargs):
            self.beat()
            return original(accumulator, *args, **kwargs)

        ImportanceAccumulator.step = step

    def beat(self):
        os.write(self.pipe, b".")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.beat()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.beat()

    def on_train_end(self, trainer, pl_module):
        self.beat()


def live(model, out, beats, seconds):
    """Starts or resumes the run in a child, kills it ``seconds`` after its beat number ``beats``.

    Returns whether it ended before that. How far a life gets hangs on the beats, not on the speed of the machine.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        fit(model=model, out=str(out), ckpt_path="last", callbacks=[Beat(writing)], **SETTINGS)
        os._exit(0)
    os.close(writing)
    ended = False
    while beats > 0 and not ended:
        got = os.read(reading, beats)
        beats, ended = beats - len(got), not got
    until = time.monotonic() + seconds
    while not ended and select.select([reading], [], [], max(until - time.monotonic(), 0.0))[0]:
        ended = not os.read(reading, 1)
    os.close(reading)
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or not ended, f"the run failed by itself: {status}"
    return ended


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
    generator, out = random.Random(seed), Path(out)
    assert live(model, out / "warmup", 0, FOREVER)  # the first life of all reads and compiles more than the others
    start = time.monotonic()
    assert live(model, out / "undisturbed", 0, FOREVER)
    whole_run = time.monotonic() - start
    moments, runs, scripted = [], [], list(SCRIPTED)
    while len(moments) < kills:
        run = out / f"run{len(runs)}"
        while len(moments) < kills:
            if scripted:
                ended = live(model, run, scripted.pop(0), 0.02)
            elif generator.random() < 0.25:  # anywhere: while it loads, prunes, exports or writes its report
                ended = live(model, run, 0, generator.uniform(0.0, whole_run))
            else:
                ended = live(model, run, generator.randint(1, 8), generator.uniform(0.0, 0.05))
            if ended:
                break
            moments.append(reached(run))
        assert ended or live(model, run, 0, FOREVER)
        runs.append(str(run))
    print(json.dumps({"moments": moments, "runs": runs, "undisturbed": str(out / "undisturbed")}))
