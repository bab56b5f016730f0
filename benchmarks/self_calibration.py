"""Kept units calibrated on text that the model writes itself, beside those calibrated on C4: overlap, perplexity, KL.

    python benchmarks/self_calibration.py --c4 c4_sample_1.jsonl.gz --text wikitext2_test_raw.txt --out OUT

SmolLM2-135M-Instruct, entropy, per-token activation Taylor, 20 % of all parameters removed. Rows: two draws of C4
(seeds 42 and 43: how much two calibration sets differ anyway), the model's own text from its BOS token, and from
``--start``. All have the same number of sequences and tokens. Whatever is finished lies in ``OUT`` and is not done
again: sums of the scores and figures of each row (texts lie in hfprune's cache folder). Interrupted, the same command
goes on.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

from hfprune.allocation import resolve, uniform_keep
from hfprune.data import TextDataModule
from hfprune.data.self_generated import SelfText, author_of
from hfprune.evaluation.evaluate import measure
from hfprune.evaluation.fidelity import DenseReference
from hfprune.io.load import load_causal_lm
from hfprune.models import class_name, find_groups, find_spec, parameter_count, unit_cost
from hfprune.models.surgery import apply_plan
from hfprune.modules import PruningModule
from hfprune.plan import Budget, PruningPlan
from hfprune.sweep import Method
from hfprune.sweep.results import overlap
from hfprune.sweep.scoring import seed_scores
from hfprune.utils.files import write_json


def bound(args, module, source, *, seed=42, **kwargs):
    data = TextDataModule(
        source,
        text=args.text,
        seq_len=args.length,
        calibration_sequences=args.sequences,
        eval_windows=args.windows,
        eval_window=args.window,
        seed=seed,
        **kwargs,
    )
    data.bind(
        module.tokenizer,
        vocab_size=module.vocab_size,
        max_positions=module.max_positions,
        author=author_of(module, device=args.device),
    )
    return data


def sources(args, module):
    """Name -> data; the model's own text with the temperature and top-p that were asked for."""
    own = {"temperature": args.temperature, "top_p": args.top_p, "batch_size": args.batch_size}
    return {
        "c4": bound(args, module, args.c4),
        "c4, another draw": bound(args, module, args.c4, seed=43),
        "self, from BOS": bound(args, module, "self", self_text=SelfText(**own)),
        f"self, from {args.start}": bound(args, module, "self", self_text=SelfText(**own, start=args.start)),
    }


def kept_units(args, module, name, data):
    """Returns the kept units, and the width, of 20 % fewer parameters."""
    dense = module.causal_lm
    groups = find_groups(dense)
    costs, total = [unit_cost(dense, group) for group in groups], parameter_count(dense)
    budget = Budget(pruning_ratio=args.pruning_ratio)
    found = resolve(budget, groups, costs, dense_params=total, hidden_size=dense.config.hidden_size)
    batches = iter(data.calibration_dataloader())
    key = data.summary()["calibration"]["sha256"]
    path = args.out / "scores" / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"
    methods = [Method(name="entropy", objective="entropy")]
    scores = seed_scores(dense, methods, batches, path, key=f"{module.fingerprint} {key}")
    return uniform_keep(scores["entropy"], groups, found.widths), found.width


def figures(model, windows, reference):
    found = measure(model, windows, reference=reference, latency=False)
    return {
        "perplexity": found.perplexity.value,
        "kl": found.fidelity.to_dict()["kl"],
        "parameters": parameter_count(model),
    }


def pruned(args, module, keep, width):
    model = load_causal_lm(module.path, dtype="float32")
    config = {find_spec(model).width_key: width}
    apply_plan(model, PruningPlan(model_class=class_name(model), groups=find_groups(model), keep=keep, config=config))
    return model.to(args.device)


def cell(args, module, name, data, state):
    """Returns the row of one source, from the results when it is there."""
    start = time.perf_counter()
    data.calibration_dataloader()
    told = data.summary()["calibration"]
    writing = time.perf_counter() - start
    key = f"{told['sha256']} {state['windows'].sha256} {args.pruning_ratio}"
    row = args.results.get(name)
    if row is None or row["key"] != key:
        keep, width = kept_units(args, module, name, data)
        if state["reference"] is None:
            state["reference"] = DenseReference.collect(module.causal_lm, state["windows"], copy_head=False)
        row = {"key": key, "keep": keep, "tokens": told["tokens"], "seconds_text": writing, "sha256": told["sha256"]}
        row |= figures(pruned(args, module, keep, width), state["windows"], state["reference"])
        args.results[name] = row
        write_json(args.out / "results.json", args.results)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--c4", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--start", default="<|endoftext|>")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--pruning_ratio", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    path = args.out / "results.json"
    args.results = json.loads(path.read_text()) if path.is_file() else {}
    module = PruningModule(args.model, dtype="float32")
    module.configure_model()
    module.model.to(args.device)
    every = sources(args, module)
    state = {"windows": every["c4"].evaluation_windows(), "reference": None}
    print(f"{args.sequences} sequences of {args.length} tokens, {args.pruning_ratio:.0%} of all parameters removed")
    print(f"{'calibrated on':<26} {'overlap with c4':>15} {'perplexity':>11} {'KL':>7} {'text s':>7}")
    rows = {}
    for name, data in every.items():
        rows[name] = row = cell(args, module, name, data, state)
        shared = overlap(rows["c4"]["keep"], row["keep"])
        print(
            f"{name:<26} {shared:>15.3f} {row['perplexity']:>11.2f} {row['kl']:>7.3f} {row['seconds_text']:>7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
