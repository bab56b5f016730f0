"""Start-up of commands: CPU seconds to the answer, as a ratio to importing torch, transformers and Lightning.

    python benchmarks/startup.py            # a tiny model, 3 rounds

Every figure is user and system time of one process, the least of the rounds, which run all processes in turn. ``prune``
ends when its first calibration batch begins: it has parsed, checked and loaded everything, and measured the dense
model. The ratio is to the imports that the command cannot do without: ``plan`` needs no Lightning.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = "import torch, transformers.models.llama.modeling_llama"
REFERENCES = {"torch, transformers": MODEL, "torch, transformers, lightning": f"{MODEL}, lightning.pytorch"}
RUN = "import sys; from hfprune.cli import main; sys.exit(main(sys.argv[1:]))"
FIRST_BATCH = """
import logging, os, sys
from hfprune.cli import main

class AtFirstBatch(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("calibrating"):
            os._exit(0)

logger = logging.getLogger("hfprune")
logger.addHandler(AtFirstBatch())
logger.setLevel("INFO")
main(sys.argv[1:])
sys.exit(9)  # no batch
"""
DATA = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_window=16", "--data.eval_windows=2"]


def commands(model):
    """Returns name -> (code, arguments, exit status, reference)."""
    prune = ["prune", model, "--ratio=0.2", "-o", "out", "--latency=false", "--trainer.accelerator=cpu", *DATA]
    light, full = REFERENCES
    return {
        "hfprune --help": (RUN, ["--help"], 0, full),
        "hfprune prune --help": (RUN, ["prune", "--help"], 0, full),
        "hfprune prune MODEL --ration 0.2 (an error)": (RUN, ["prune", model, "--ration", "0.2"], 2, full),
        "hfprune plan MODEL": (RUN, ["plan", model], 0, light),
        "hfprune inspect MODEL": (RUN, ["inspect", model], 0, light),
        "hfprune prune MODEL, to the first batch": (FIRST_BATCH, prune, 0, full),
    }


def seconds(code, args, status, folder):
    """Returns the CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=folder, env=environment, capture_output=True)
    if done.returncode != status:
        raise SystemExit(f"{args}: exit status {done.returncode}\n{done.stderr.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def tiny_model(folder):
    """Saves a tiny model and its tokenizer; returns the folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.helpers.models import save_tiny

    return str(save_tiny(Path(folder, "tiny")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder (default: a tiny one)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder) if args.model is None else os.path.abspath(args.model)
        jobs = {name: (code, [], 0, name) for name, code in REFERENCES.items()} | commands(model)
        found = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, (code, words, status, _) in jobs.items():
                found[name].append(seconds(code, words, status, folder))
    least = {name: min(times) for name, times in found.items()}
    for name, (_, _, _, reference) in jobs.items():
        print(f"{name:<46}{least[name]:6.2f} s   x{least[name] / least[reference]:.2f}")


if __name__ == "__main__":
    main()
