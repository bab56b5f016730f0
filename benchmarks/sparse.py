"""Perplexity, time and peak memory of every sparse method; peak memory against the number of layers.

    python benchmarks/sparse.py --calibration C4.jsonl --text WIKI.txt --results sparse.jsonl
    python benchmarks/sparse.py --part layers --results sparse_layers.jsonl

``methods``: SmolLM2-135M-Instruct, calibrated on 128 sequences of 512 C4 tokens (``--sequences 32`` for the protocol
that other tools were measured with), WikiText-2 perplexity on the first 40 non-overlapping windows of 512 tokens, at
50 %, 60 %, 4:8 and 2:4; three seeds of calibration text at 50 %. Time and peak memory are relative to a dense forward
pass of the same tokens, one sequence at a time, logits included, in the same process: time is CPU time, scaled up from
``--forward`` sequences; memory is the resident high-water mark beyond the loaded model. ``--autocast`` evaluates, and
only evaluates, under bfloat16 autocast, as other tools were measured.

``layers``: a random Llama of 12, 24 and 48 layers, peak memory beyond the loaded model.

One JSON line a cell, each in a process of its own; cells that the file holds are skipped, so that an interrupted run
goes on with the same command. ``--only wanda,sparsegpt`` and ``--patterns 0.5`` choose cells; ``--table`` prints them.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune import PruningModule, TextDataModule
from hfprune.evaluation.perplexity import perplexity
from hfprune.models.forward import sequences
from hfprune.sparse import OutlierWeighed, SparseGPT, Sparsity, sparse_method
from hfprune.sparse.engine import prune_sparse

NAMES = (
    "magnitude", "magnitude_model", "relative_importance", "wanda", "wanda_adaptive", "sparsegpt", "ria",
    "ria_assigned", "z_pruner", "taylor", "taylor_cross_entropy", "wanda+update", "ria+update", "wanda+owl",
)  # fmt: skip
PATTERNS = ("0.5", "0.6", "4:8", "2:4")
ONE_RANKING = ("magnitude_model", "wanda+owl", "wanda_adaptive")  # no n:m
PERMUTED = ("ria_assigned",)  # nothing but n:m
NO_DATA = ("magnitude", "magnitude_model", "relative_importance")  # the same for every seed
SEEDS = (0, 1, 2)


def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def resident_mib():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measured(work):
    """Returns CPU seconds, wall seconds, MiB beyond what was resident before, and the result."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before is not resident
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = resident_mib(), time.perf_counter(), time.process_time()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, peak_mib() - before, result


def forward(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)


def parts(name, pattern):
    """Returns the arguments of ``prune_sparse`` that a cell's name stands for."""
    method, _, extra = name.partition("+")
    more = {"update": SparseGPT()} if extra == "update" else {"allocation": OutlierWeighed()} if extra else {}
    return {"method": sparse_method(method), "sparsity": Sparsity.parse(pattern), **more}


def run_cell(cell):
    """Runs in a process of its own: prints one JSON object."""
    module = PruningModule(cell["model"], dtype="float32")
    module.configure_model()
    model = module.model.eval().requires_grad_(False)
    data = TextDataModule(
        cell["calibration"], text=cell["text"], seq_len=cell["length"], calibration_sequences=cell["sequences"],
        seed=cell["seed"], eval_windows=40, eval_window=512,
    )  # fmt: skip
    data.bind(module.tokenizer, vocab_size=module.vocab_size, max_positions=module.max_positions)
    batches = [{"input_ids": s["input_ids"]} for batch in data.calibration_dataloader() for s in sequences(batch)]
    few = batches[: cell["forward"]]
    forward(model, few[:1])  # what any run allocates once
    base_cpu, base_wall, base_peak, _ = measured(lambda: forward(model, few))
    scale = len(batches) / len(few)
    work = parts(cell["name"], cell["pattern"])
    cpu, wall, peak, layers = measured(lambda: list(prune_sparse(model, batches, **work)))
    matrices = [m for layer in layers for m in layer.matrices.values()]
    with torch.autocast("cpu", torch.bfloat16, enabled=cell["autocast"]):
        value = perplexity(model, data.evaluation_windows()).value
    found = {
        "perplexity": value,
        "zeros": sum(m.zeros for m in matrices) / sum(m.weights for m in matrices),
        "mean_layer_error": statistics.mean(layer.error for layer in layers),
        "cpu_seconds": cpu,
        "cpu_ratio": cpu / (base_cpu * scale),
        "wall_ratio": wall / (base_wall * scale),
        "peak_mib": peak,
        "forward_peak_mib": base_peak,
        "peak_ratio": peak / base_peak,
    }
    print(json.dumps({"cell": cell, "found": found}))


def run_layers(cell):
    """Runs in a process of its own: the peak of the pass on a random model of so many layers."""
    config = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=cell["layers"],
                         num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(3, 1000, (cell["sequences"], 128))
    batches = [{"input_ids": row[None]} for row in ids]
    forward(model, batches[:1])
    _, _, peak, _ = measured(lambda: list(prune_sparse(model, batches, **parts(cell["name"], "0.5"))))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(json.dumps({"cell": cell, "found": {"peak_mib": peak, "weights_mib": weights}}))


def cells(args):
    """Returns every cell that was asked for, the three seeds last."""
    if args.part == "layers":
        return [
            {"part": "layers", "name": name, "layers": layers, "sequences": 16}
            for name in ("wanda", "sparsegpt") for layers in (12, 24, 48)
        ]  # fmt: skip
    names = ("model", "calibration", "text", "length", "sequences", "forward", "autocast")
    common = {name: getattr(args, name) for name in names}
    found = []
    for seed in SEEDS:
        for pattern in args.patterns.split(","):
            for name in args.only.split(","):
                group = ":" in pattern
                repeated = seed and (pattern != "0.5" or name in NO_DATA)
                if (group and name in ONE_RANKING) or (not group and name in PERMUTED) or repeated:
                    continue
                found.append({"part": "methods", "name": name, "pattern": pattern, "seed": seed, **common})
    return found


def table(rows):
    """Prints mean and deviation over seeds, by method and pattern."""
    values, costs = defaultdict(list), defaultdict(list)
    for row in rows:
        cell, found = row["cell"], row["found"]
        values[cell["name"], cell["pattern"]].append(found["perplexity"])
        costs[cell["name"]].append((found["cpu_ratio"], found["peak_ratio"]))
    print("| method | " + " | ".join(PATTERNS) + " | time / forward (CPU) | peak memory / forward |")
    print("|---" * (len(PATTERNS) + 3) + "|")
    for name in costs:
        shown = []
        for pattern in PATTERNS:
            found = values.get((name, pattern), [])
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            shown.append(f"{statistics.mean(found):.1f}{spread}" if found else "-")
        cpu, peak = (statistics.median(column) for column in zip(*costs[name], strict=True))
        print(f"| {name} | {' | '.join(shown)} | {cpu:.2f} | {peak:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("methods", "layers"), default="methods")
    parser.add_argument("--results", default="sparse.jsonl", help="one line a finished cell")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--forward", type=int, default=8, help="sequences of the timed dense forward pass")
    parser.add_argument("--autocast", action="store_true", help="evaluate under bfloat16 autocast")
    parser.add_argument("--only", default=",".join(NAMES), help="methods, separated by commas")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--limit", type=int, default=None, help="run at most this many cells now")
    parser.add_argument("--table", action="store_true", help="print what the file holds, run nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        cell = json.loads(args.cell)
        (run_layers if cell["part"] == "layers" else run_cell)(cell)
        return
    path = Path(args.results)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if args.table:
        table(rows)
        return
    done = [row["cell"] for row in rows]
    for cell in islice((c for c in cells(args) if c not in done), args.limit):
        command = [sys.executable, __file__, "--cell", json.dumps(cell)]
        environment = dict(os.environ)
        if cell["part"] == "layers":  # freed memory goes back at once: peaks say what was needed; slower
            environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        out = ran.stdout.splitlines()[-1]
        with path.open("a") as file:
            file.write(out + "\n")
        row = json.loads(out)
        print(row["cell"]["name"], row["cell"].get("pattern", row["cell"].get("layers")), row["found"], flush=True)


if __name__ == "__main__":
    main()
