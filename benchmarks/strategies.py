"""What DDP gains and what the callback costs, each beside a reference measured in the same run.

    python benchmarks/strategies.py                  # SmolLM2-135M, 16 sequences of 256 tokens, 5 rounds
    python benchmarks/strategies.py --part overhead

``ddp``: calibration of N sequences by one process, by two DDP processes, and by two processes that know nothing of each
other and take N / 2 sequences each; one thread per process. The last is what two processes can reach on the machine at
all. Figures are speed-ups over one process.

``overhead``: calibration by ``TaylorImportanceCallback`` in a Trainer, beside a bare loop of forward and backward
passes on the same tokens (weights frozen, the graph beginning where calibration's does, no other hooks, no scores).

Times are those of the calibration loop alone; variants alternate; ratios are per round, with their median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback
from hfprune.models import find_groups
from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES
from hfprune.pruning import planner as planner_module
from hfprune.pruning.calibration import Calibration


class Tokens(L.LightningDataModule):
    """Random sequences, one a batch."""

    def __init__(self, count, length, vocab_size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, vocab_size, (count, length), generator=generator)

    def calibration_dataloader(self):
        return DataLoader([{"input_ids": row} for row in self.ids], batch_size=1)


class Timed(Calibration):
    """Notes how long the pass took; waits for ``go`` first."""

    seconds = 0.0
    go = staticmethod(lambda: None)

    def run(self, *args, **kwargs):
        Timed.go()
        start = time.perf_counter()
        result = super().run(*args, **kwargs)
        Timed.seconds = time.perf_counter() - start
        return result


def calibrate(model, args, *, count, devices=1):
    planner_module.Calibration = Timed
    trainer = PruneTrainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False, max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[TaylorImportanceCallback(pruning_ratio=0.2)],
    )  # fmt: skip
    module = PruningModule(model)
    trainer.prune(module, Tokens(count, args.length, module.vocab_size))
    return trainer, Timed.seconds


# ---- processes of their own ------------------------------------------------------------------------------------------


def child(args):
    """Runs one variant; prints its seconds from the rank that says so."""
    torch.set_num_threads(1)
    if args.wait:
        Timed.go = staticmethod(lambda: wait_for_others(Path(args.wait)))
    trainer, seconds = calibrate(args.model, args, count=args.sequences, devices=args.devices)
    if trainer.is_global_zero:
        print(json.dumps(seconds))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_others(folder):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.005)


def launch(args, *, sequences, devices=1, wait=None):
    flags = [f"--model={args.model}", f"--length={args.length}", f"--sequences={sequences}", f"--devices={devices}"]
    command = [sys.executable, __file__, "--child", *flags, *([f"--wait={wait}"] if wait else [])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def seconds_of(process):
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a child failed with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def ddp(args):
    found = {"one": [], "ddp": [], "independent": []}
    for _ in range(args.rounds):
        found["one"].append(seconds_of(launch(args, sequences=args.sequences)))
        found["ddp"].append(seconds_of(launch(args, sequences=args.sequences, devices=2)))
        with tempfile.TemporaryDirectory() as folder:
            pair = [launch(args, sequences=args.sequences // 2, wait=folder) for _ in range(2)]
            found["independent"].append(max(seconds_of(process) for process in pair))
    print(f"{args.sequences} sequences of {args.length} tokens, one thread per process, {args.rounds} rounds")
    for name, values in found.items():
        print(f"  {name:<12} {statistics.median(values):7.2f} s")
    speedup = {name: ratios(found["one"], values) for name, values in found.items() if name != "one"}
    for name, values in speedup.items():
        print(f"speed-up over one process, {name}: {shown(values)}")
    print(f"ddp / independent: {shown(ratios(found['independent'], found['ddp']))}")


# ---- overhead --------------------------------------------------------------------------------------------------------


def bare_loop(model, ids):
    """Forward and backward, nothing else."""
    first = model.get_submodule(find_groups(model)[0].inputs()[0].module)
    handle = first.register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(),))
    start = time.perf_counter()
    for row in ids:
        total, _ = objective_sum(model, OBJECTIVES.get("entropy"), {"input_ids": row[None]})
        total.backward()
    seconds = time.perf_counter() - start
    handle.remove()
    return seconds


def overhead(args):
    found = {"bare": [], "callback": []}
    for index in range(args.rounds + 1):
        module = PruningModule(args.model)  # loaded anew for either, so that neither finds its weights in a warm cache
        module.configure_model()
        ids = Tokens(args.sequences, args.length, module.vocab_size).ids
        bare = bare_loop(module.causal_lm.eval().requires_grad_(False), ids)
        del module
        _, seconds = calibrate(args.model, args, count=args.sequences)
        if index:  # the first round warms up
            found["bare"].append(bare)
            found["callback"].append(seconds)
    print(
        f"{args.sequences} sequences of {args.length} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name, values in found.items():
        print(f"  {name:<12} {statistics.median(values):7.2f} s")
    print(f"callback / bare loop: {shown(ratios(found['callback'], found['bare']))}")


def ratios(a, b):
    return [x / y for x, y in zip(a, b, strict=True)]


def shown(values):
    return f"{statistics.median(values):.3f} (min {min(values):.3f}, max {max(values):.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("ddp", "overhead", "all"), default="all")
    for hidden in ("--wait", "--devices", "--child"):
        kind = {"action": "store_true"} if hidden == "--child" else {"type": int if hidden == "--devices" else str}
        parser.add_argument(hidden, help=argparse.SUPPRESS, **kind)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.part in ("overhead", "all"):
        overhead(args)
    if args.part in ("ddp", "all"):
        ddp(args)


if __name__ == "__main__":
    main()
