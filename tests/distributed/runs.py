"""Runs of ``fit_script`` in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KILLED = 9
STRATEGIES = {"single": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
MORE = {"fsdp2_alone": ("fsdp2", 1)}


def start(folder, out, strategy, *, fails=False, **kwargs):
    name, devices = (STRATEGIES | MORE)[strategy]
    config = {"model": folder, "out": str(out), "strategy": name, "devices": devices} | kwargs
    command = [sys.executable, "-m", "tests.distributed.fit_script", json.dumps(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    expected = 1 if fails else KILLED if config.get("die") else 0
    assert done.returncode == expected, done.stderr[-3000:]
    return done.stderr


def results(out, strategy):
    return [torch.load(out / f"rank{rank}.pt") for rank in range((STRATEGIES | MORE)[strategy][1])]


def run(folder, out, strategy, **kwargs):
    start(folder, out, strategy, **kwargs)
    return results(out, strategy)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
