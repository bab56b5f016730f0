"""What recovery gives back for the same tokens: LoRA and all weights, on the text and towards the dense model.

    python benchmarks/recovery.py --calibration C4.jsonl --recovery OTHER_C4.jsonl --text WIKI.txt --out OUT

SmolLM2-135M-Instruct, pruned once for each start (``hfprune prune``): ``entropy``, entropy scores on 32 sequences of
512 tokens, kept weights as they are; ``fitted``, activation norms and LeastSquares on 128 sequences; ``sensitivity``,
the same with widths by measured KL (``configs/prune_sensitivity.yaml``). Every mode then
trains on the same rows of 512 tokens, in the same order, AdamW, cosine; a seed draws rows, order and adapters anew:

``lora_ce``, ``lora_kd``: rank 32 adapters on every projection; cross-entropy, or KL to the dense model's predictions,
of which the ``--top_k`` most likely tokens a position are kept on disk (0: all of them, the dense model beside).
``full_ce``, ``full_kd``: all weights.
``lora_mix``, ``full_mix``: the mean of the two losses.
``lora_hidden``, ``full_hidden``: the whole KL and the distance of hidden states at layer ends, the dense model beside.
``dense``: the dense model with all weights tuned by cross-entropy on the same rows, the control.

Figures are in float32: perplexity and KL to the untuned dense model on the text's first 40 windows of 512 tokens,
cross-entropy on validation rows of the recovery text. One JSON line a cell in ``OUT/results.jsonl``, each in a process
of its own; what is there is skipped, so that an interrupted run goes on with the same command. ``--table`` prints it.
``--tasks`` and ``--task_data`` add the zero-shot tasks, in bfloat16.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from safetensors.torch import load_file, save_file

from hfprune import LoraRecovery, PruningModule, TextDataModule
from hfprune.evaluation.evaluate import measure
from hfprune.evaluation.fidelity import DenseReference
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.io.load import load_causal_lm
from hfprune.models import output_head
from hfprune.recovery import DistillationRecovery
from hfprune.recovery.lora import add_lora

STARTS = {
    "entropy": ["--method", "entropy", "--data.calibration_sequences", "32"],
    "fitted": [
        "--data.calibration_sequences", "128", "--importance.criterion", "ActivationNorm",
        "--importance.compensation", "LeastSquares",
    ],
    "sensitivity": ["--config", str(Path(__file__).parents[1] / "configs" / "prune_sensitivity.yaml")],
}  # fmt: skip
MODES = ("lora_ce", "lora_kd", "full_ce", "full_kd")


def start_folder(args, start, ratio):
    """Returns the folder of a pruned model, made by the command line where it is not there."""
    out = args.out / f"{start}_{ratio:g}"
    if not (out / "report.json").is_file():
        command = [
            sys.executable, "-m", "hfprune", "prune", *STARTS[start],
            "--model.path", args.model, "--model.dtype", "float32", "--data.calibration", args.calibration,
            "--data.text", args.text, "--data.seq_len", "512",
            "--data.seed", "42", "--pruning_ratio", str(ratio), "--latency", "false", "--overwrite", "true",
            "--output_dir", str(out), "--trainer.accelerator", args.accelerator,
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return out


def reference(args, module, windows):
    """Returns the dense model's predictions; its final hidden states are computed once, its head is a copy."""
    path = args.out / "dense.safetensors"
    head = output_head(module.causal_lm)
    head = dataclasses.replace(head, weight=head.weight.detach().clone())
    if not path.is_file():
        found = DenseReference.collect(module.causal_lm, windows, copy_head=False)
        save_file({"hidden": found.hidden.contiguous()}, path)
    return DenseReference(windows=windows, hidden=load_file(path)["hidden"], head=head)


def make_trainer(args, cell):
    return Trainer(
        max_epochs=cell["epochs"], precision=args.precision, accelerator=args.accelerator, devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        check_val_every_n_epoch=cell["epochs"] + 1, num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip


def trained(cell, module, data, trainer):
    """Recovers the model that ``module`` holds; returns what training took."""
    if cell["mode"].startswith("lora"):
        module.lora = LoraRecovery(rank=32, alpha=64, dropout=0.0)
        module.model = add_lora(module.model, module.lora, seed=cell["seed"])
    trainer.fit(module, datamodule=data)
    took = {"minutes": module.training_seconds / 60, "flops": module.training_flops}
    validation = trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
    return took | {"tokens": module.trained_tokens, "steps": trainer.global_step, "val_loss": validation[0]["val_loss"]}


def run_cell(args, cell):
    """Runs in a process of its own: prints one JSON object."""
    seed_everything(cell["seed"])
    dense = cell["start"] == "dense"
    if "hidden" in cell:
        distillation = DistillationRecovery(hidden=cell["hidden"])
    elif "top_k" in cell:
        kept = {"cache": str(args.out / "teacher"), "top_k": args.top_k} if args.top_k else {}
        distillation = DistillationRecovery(alpha=0.5 if cell["mode"].endswith("mix") else 1.0, **kept)
    else:
        distillation = None
    module = PruningModule(
        args.model, dtype="float32", learning_rate=cell["lr"], warmup_ratio=0.05,
        distillation=distillation,
    )  # fmt: skip
    module.run_seed = cell["seed"]
    module.configure_model()
    data = TextDataModule(
        args.calibration, recovery=args.recovery, text=args.text, seq_len=512, batch_size=cell["batch"],
        recovery_sequences=cell["tokens"] // 512, seed=cell["seed"],
    )  # fmt: skip
    data.bind(module.tokenizer, vocab_size=module.vocab_size, max_positions=module.max_positions)
    trainer = make_trainer(args, cell)
    device = trainer.strategy.root_device
    module.model.to(device)
    known = reference(args, module, data.evaluation_windows())
    if not dense:
        module.model = load_causal_lm(str(start_folder(args, cell["start"], cell["ratio"]) / "model"), dtype="float32")
    found = trained(cell, module, data, trainer)
    module.unwrap()
    module.causal_lm.to(device)
    figures = measure(module.causal_lm, known.windows, reference=known, latency=False)
    found |= {"perplexity": figures.perplexity.value, "kl": figures.fidelity.kl, "parameters": figures.parameters}
    found["top1"] = figures.fidelity.top1_agreement
    if args.tasks:
        tasks = ZeroShotTasks(args.tasks.split(","), limit=args.limit, data_dir=args.task_data)
        found["tasks"] = tasks.run(module.causal_lm.to(torch.bfloat16), module.tokenizer).to_dict()
    print(json.dumps({"cell": cell, "found": found}))


def cells(args):
    """Returns every cell that was asked for; the dense control comes first."""
    common = {"tokens": args.tokens, "batch": args.batch, "epochs": args.epochs}
    found = []
    for seed in args.seeds:
        if args.control:
            found.append(
                {"start": "dense", "mode": "full_ce", "ratio": 0.0, "seed": seed, "lr": args.lr_full, **common}
            )
        for start in args.starts.split(",") if args.starts else ():
            for mode in args.modes.split(","):
                rate = args.lr_lora if mode.startswith("lora") else args.lr_full
                cell = {"start": start, "mode": mode, "ratio": args.ratio, "seed": seed, "lr": rate, **common}
                if mode.endswith("hidden"):
                    cell["hidden"] = args.hidden
                if mode.endswith(("kd", "mix")):
                    cell["top_k"] = args.top_k
                found.append(cell)
    return found


def table(args, rows):
    """Prints mean and deviation over seeds, by start and mode, the starts themselves included."""
    lines = defaultdict(list)
    for report in sorted(args.out.glob("*/report.json")):
        stages = json.loads(report.read_text())["stages"]
        start, ratio = report.parent.name.rsplit("_", 1)
        for name, stage in (("dense", stages["dense"]), (start, stages["pruned"])):
            key = (name, "0" if name == "dense" else ratio, "-")
            lines[key].append((stage["perplexity"]["value"], stage["fidelity"]["kl"], 0, 0))
    for row in rows:
        cell, found = row["cell"], row["found"]
        how = [f"{name} {cell[name]:g}" for name in ("lr", "epochs", "batch", "top_k", "hidden") if name in cell]
        key = (cell["start"], f"{cell['ratio']:g}", ", ".join([cell["mode"], f"{cell['tokens']:,}", *how]))
        lines[key].append((found["perplexity"], found["kl"], found["tokens"], found["minutes"]))
    base = lines["dense", "0", "-"][0][0]
    print("| start | removed | recovery | perplexity | of dense | KL | tokens | minutes |\n" + "|---" * 8 + "|")
    for (start, ratio, mode), found in lines.items():
        columns = list(zip(*found, strict=True))
        spread = [f" ± {statistics.stdev(column):.3g}" if len(set(column)) > 1 else "" for column in columns]
        mean = [statistics.mean(column) for column in columns]
        shown = f"{mean[0]:.2f}{spread[0]} | {mean[0] / base:.2f} | {mean[1]:.3f}{spread[1]}"
        print(f"| {start} | {float(ratio):.0%} | {mode} | {shown} | {mean[2]:,.0f} | {mean[3]:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True, help="text that starts are calibrated on")
    parser.add_argument("--recovery", required=True, help="text that recovery trains on")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=204_800, help="tokens of recovery text")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them")
    parser.add_argument("--batch", type=int, default=4, help="rows of 512 tokens a step")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    parser.add_argument("--top_k", type=int, default=64, help="tokens a position that the dense model's cache keeps")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters removed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--control", action="store_true", help="tune the dense model, too")
    parser.add_argument("--lr_full", type=float, default=3e-4)
    parser.add_argument("--lr_lora", type=float, default=1e-3)
    parser.add_argument("--hidden", type=float, default=5.0, help="weight of the distance of hidden states")
    parser.add_argument("--tasks", default="", help="zero-shot tasks, separated by commas")
    parser.add_argument("--task_data", default=None, help="folder of released task files")
    parser.add_argument("--limit", type=int, default=100, help="items a task")
    parser.add_argument("--table", action="store_true", help="print what the folder holds, run nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        run_cell(args, json.loads(args.cell))
        return
    path = args.out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if args.table:
        table(args, rows)
        return
    done = [row["cell"] for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells(args) if cell not in done]
    for start, ratio in dict.fromkeys((cell["start"], cell["ratio"]) for cell in todo):
        if start != "dense":
            start_folder(args, start, ratio)

    def run(cell):
        command = [sys.executable, *sys.argv, "--cell", json.dumps(cell)]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        with path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        if todo and not (args.out / "dense.safetensors").is_file():
            run(todo.pop(0))  # computes what the others read
        list(pool.map(run, todo))


if __name__ == "__main__":
    main()
