"""What a shared calibration pass and shared prefixes save, each beside what they replace, in the same run.

    python benchmarks/evaluation.py --part sweep               # SmolLM2-135M, 8 sequences of 256 tokens, 3 rounds
    python benchmarks/evaluation.py --part tasks --task_data DIR

``sweep``: the scores of two objectives from one pass, relative to one calibration with one objective; and what four
widths add (allocation alone: cells are measured whatever made their scores).

``tasks``: zero-shot items through ``PrefixLM``, relative to lm-eval's own ``HFLM`` on the same items, and the largest
difference between their figures.

Variants alternate; ratios are per round, with their median and range.
"""

import argparse
import statistics
import time

import torch

from hfprune.allocation import uniform_keep
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.io.load import load_causal_lm, load_tokenizer
from hfprune.models import find_groups
from hfprune.sweep import Method
from hfprune.sweep.scoring import shared_pass

METHODS = [Method(name=name, objective=name) for name in ("entropy", "cross_entropy")]


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def calibrate(model, methods, batches):
    shared = shared_pass(model, methods, batches)
    shared.run()
    return {method.name: scores for method, scores in zip(methods, shared.scores(), strict=True)}


def sweep(args):
    model = load_causal_lm(args.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (args.sequences, args.length), generator=generator)
    batches = [{"input_ids": row[None]} for row in ids]
    calibrate(model, METHODS, batches[:1])
    groups = find_groups(model)
    widths = [int(groups[0].num_units * share) for share in (0.9, 0.8, 0.7, 0.6)]
    ratios = []
    for _ in range(args.rounds):
        one, alone = timed(lambda: calibrate(model, METHODS[:1], batches))
        two, scores = timed(lambda: calibrate(model, METHODS, batches))
        start = time.perf_counter()
        kept = {(m.name, k): uniform_keep(scores[m.name], groups, k) for m in METHODS for k in widths}
        allocation = time.perf_counter() - start
        assert kept["entropy", widths[0]] == uniform_keep(alone["entropy"], groups, widths[0])
        ratios.append((two + allocation) / one)
        print(f"one objective {one:.2f} s, two {two:.2f} s, eight allocations {allocation:.3f} s: {ratios[-1]:.3f}")
    report("two objectives x four widths / one calibration", ratios)


def tasks(args):
    model, tokenizer = load_causal_lm(args.model), load_tokenizer(args.model)
    settings = {"data_dir": args.task_data, "limit": args.limit}
    ours = ZeroShotTasks(args.tasks.split(","), share_prefixes=True, **settings)
    stock = ZeroShotTasks(args.tasks.split(","), share_prefixes=False, batch_size=1, **settings)
    ratios, difference = [], 0.0
    for _ in range(args.rounds):
        fast, found = timed(lambda: ours.run(model, tokenizer))
        slow, expected = timed(lambda: stock.run(model, tokenizer))
        ratios.append(fast / slow)
        for name, task in found.tasks.items():
            for metric, value in task.metrics.items():
                difference = max(difference, abs(value - expected.tasks[name].metrics[metric]))
        print(f"shared prefixes {fast:.1f} s, lm-eval's model {slow:.1f} s, ratio {ratios[-1]:.3f}")
    report("shared prefixes / lm-eval's model", ratios)
    print(f"largest difference of a figure: {difference:.2g}")


def report(what, ratios):
    print(f"{what}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["sweep", "tasks"], default="sweep")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--task_data", help="folder of released data sets")
    parser.add_argument("--tasks", default="paper10,hellaswag")
    parser.add_argument("--limit", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (sweep if args.part == "sweep" else tasks)(args)


if __name__ == "__main__":
    main()
