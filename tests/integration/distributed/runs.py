"""Runs of ``fit_script`` and its like, a process for each rank."""

import torch

from tests.helpers import warm

KILLED = 9
STRATEGIES = {"single": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
MORE = {"fsdp2_alone": ("fsdp2", 1)}


def start(folder, out, strategy, *, fails=False, script="fit_script", **kwargs):
    name, devices = (STRATEGIES | MORE)[strategy]
    config = {"model": folder, "out": str(out), "strategy": name, "devices": devices} | kwargs
    done = warm.run(f"tests.integration.distributed.{script}:main", ranks=devices, **config)
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
