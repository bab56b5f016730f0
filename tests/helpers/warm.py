"""Runs in processes of their own that need not import anything.

Importing torch, transformers, lightning, peft, datasets and hfprune takes several seconds, most runs of a tiny model
one. A server, started once by each process of pytest, has imported everything and forks a child for every rank of a
run; it has no threads, has drawn no random number and has initialised nothing, so that a child is as good as a new
process. Ranks find the environment of processes that were created externally: Lightning launches none itself. That it
can is tested in ``tests/integration/test_examples.py``.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5  # seconds that the other ranks have to end by themselves when one has failed, as under Lightning's launcher
IMPORTS = (
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "tests.integration.distributed.chaos_script",
    "tests.integration.distributed.recovery_script",
    "tests.integration.distributed.sparse_script",
    "tests.helpers.writers",
    "tests.helpers.kills",
)
_server = None


def run(target, *, ranks=1, timeout=240, grace=GRACE, cwd=ROOT, **kwargs):
    """Calls ``target``, ``module:function``, with arguments that JSON can hold, in a process for each rank.

    Returns what ``subprocess.run`` would. Its exit status is that of the process that failed, if any; a negative one
    is the signal that ended it.
    """
    global _server
    if _server is None:
        _server = _start()
    with tempfile.TemporaryDirectory() as folder:
        order = {"target": target, "kwargs": kwargs, "ranks": ranks, "cwd": str(cwd)}
        order |= {"timeout": timeout, "grace": grace}
        order |= {"files": [f"{folder}/out", f"{folder}/err"], "env": _environment()}
        try:
            print(json.dumps(order), file=_server.stdin, flush=True)
            status = json.loads(_server.stdout.readline())
        except BaseException:  # also the time limit of pytest: what comes later is no answer to the next order
            _stop()
            raise
        stdout, stderr = (Path(file).read_text(encoding="utf-8") for file in order["files"])
    if status is None:
        raise subprocess.TimeoutExpired(target, timeout, stdout, stderr)
    return subprocess.CompletedProcess(target, status, stdout, stderr)


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def _start():
    command, pipe = [sys.executable, "-m", "tests.helpers.warm"], subprocess.PIPE
    atexit.register(_stop)
    return subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )


def _stop():
    global _server
    if _server is not None:
        os.killpg(_server.pid, signal.SIGKILL)  # runs included
        _server.communicate()
        _server = None


def serve():
    """Imports everything, then carries out one order a line until the process that gives them is gone."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every collection in a child walks, and so copies, all that was imported
    for line in sys.stdin:
        order = json.loads(line)
        children = _fork(order)
        print(
            json.dumps(_status(children, time.monotonic() + order["timeout"], order["grace"])), file=replies, flush=True
        )


def _fork(order):
    shared = {}
    if order["ranks"] > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(order["ranks"]), "NODE_RANK": "0"}
    children = []
    for rank in range(order["ranks"]):
        child = os.fork()
        if child == 0:
            _live(order, shared | {"LOCAL_RANK": str(rank)} if shared else {}, rank)
        children.append(child)
    return children


def _live(order, ranked, rank):
    """The life of a child: never returns."""
    status = 1
    try:
        for number, file in enumerate([os.devnull, *order["files"]]):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(order["env"] | ranked)
        os.chdir(order["cwd"])
        _call(order["target"], order["kwargs"], rank)
        status = 0
    except BaseException:  # as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _call(target, kwargs, rank):
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # Lightning reads it from the environment when it is imported
    module, _, function = target.partition(":")
    sys.argv = [module]
    getattr(importlib.import_module(module), function)(**kwargs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else a process that ends first may take the other along


def _status(children, until, grace):
    """Waits for all children and returns the exit status of the run, None if they were killed for the time."""
    statuses, late = {}, False
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + grace) if statuses[child] else until
        if time.monotonic() > until:
            late = late or not any(statuses.values())
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    if late:
        return None
    return max(statuses.values()) or min(statuses.values())  # 9 before 1: one fails because the other has left


if __name__ == "__main__":
    serve()
