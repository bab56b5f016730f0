"""What each criterion's calibration, and each closed-form fit, costs beside one forward pass, in one run.

    python benchmarks/criteria.py                       # SmolLM2-135M, 8 sequences of 256 tokens, 3 rounds

Every criterion is run on the same tokens, one sequence a step, and timed in alternation with a forward pass without
gradients, all logits included. A fit is the pass through the layers alone, to two thirds of the neurons, whichever were
chosen. Given are medians of per-round ratios. Peak memory is the resident high-water mark of a
process of its own, above what the loaded model takes.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from hfprune.allocation import uniform_keep
from hfprune.compensation import LeastSquares, OutputRegression
from hfprune.criteria import (
    ActivationCriterion,
    ActivationNorm,
    ActivationTaylor,
    CoupledTaylor,
    Fisher,
    SelfDistillation,
    SlimLLMChannels,
    VectorTaylor,
    WandaStructured,
    WeightRange,
    WeightTaylor,
)
from hfprune.io.load import load_causal_lm
from hfprune.models import find_groups
from hfprune.models.forward import objective_sum, run_backbone, token_counts
from hfprune.objectives import OBJECTIVES
from hfprune.objectives.distillation import Distillation
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum
from hfprune.pruning.hooks import UnitMask
from hfprune.pruning.layerwise import LayerwisePass

VARIANTS = {
    "entropy": (ActivationTaylor(), "entropy"),
    "fisher": (Fisher(), "sampled"),
    "vectorize": (VectorTaylor(), "cross_entropy"),
    "param_first": (WeightTaylor(), "cross_entropy"),
    "param_first, dataset": (WeightTaylor(gradient="dataset"), "cross_entropy"),
    "param_mix": (WeightTaylor(salience="param_mix"), "cross_entropy"),
    "sdmprune, both stages": (CoupledTaylor(), "two stages"),
    "activation norm": (ActivationNorm(), None),
    "wanda": (WandaStructured(), None),
    "weight range": (WeightRange(), None),
    "slimllm channels": (SlimLLMChannels(), None),
}
FITS = {"fit: least squares": LeastSquares(), "fit: regression": OutputRegression()}


def run_pass(model, sequences, criterion, objective):
    accumulator = ImportanceAccumulator(model, find_groups(model), criterion)
    with accumulator.recording():
        for ids in sequences:
            batch = {"input_ids": ids[None]}
            if isinstance(criterion, ActivationCriterion):
                accumulator.observe(lambda batch=batch: run_backbone(model, batch), *token_counts(batch))
            else:

                def step(batch=batch):
                    total, valid = objective_sum(model, objective, batch)
                    return ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=None)

                accumulator.step(step)
    return accumulator.scores()


def run(model, sequences, name):
    if name == "forward":
        with torch.no_grad():
            for ids in sequences:
                model(input_ids=ids[None], use_cache=False)
        return
    if name in FITS:
        groups = find_groups(model)
        keep = {group.name: tuple(range(2 * group.num_units // 3)) for group in groups}
        LayerwisePass(model, groups, compensation=FITS[name]).run(
            [{"input_ids": ids[None]} for ids in sequences],
            {name: len(units) for name, units in keep.items()},
            keep=keep,
        )
        return
    criterion, objective = VARIANTS[name]
    if objective != "two stages":
        run_pass(model, sequences, criterion, objective and OBJECTIVES.get(objective))
        return
    groups, setting = find_groups(model), SelfDistillation()
    first = run_pass(model, sequences, criterion, OBJECTIVES.get("cross_entropy"))
    mask = UnitMask(model, groups, uniform_keep(first, groups, setting.first_widths(groups, [0] * len(groups))))
    student = Distillation(alpha=setting.alpha, temperature=setting.temperature, teacher=mask.lifted)
    with mask.active():
        run_pass(model, sequences, criterion, student)


def load(args):
    model = load_causal_lm(args.model, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (args.sequences, args.length), generator=generator)
    return model.eval().requires_grad_(False), ids


def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_memory(args):
    """Runs in a process of its own: prints the peak beyond the loaded model, in MiB."""
    model, sequences = load(args)
    run(model, sequences[:1, :8], "forward")  # allocate what any run allocates once
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    run(model, sequences[:2], args.memory)
    print(json.dumps(peak_mib() - before))


def memory(name, args):
    flags = [f"--{key}={getattr(args, key)}" for key in ("model", "length")]
    command = [sys.executable, __file__, f"--memory={name}", *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=("forward", *VARIANTS, *FITS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        measure_memory(args)
        return
    model, sequences = load(args)
    names = ["forward", *VARIANTS, *FITS]  # fits last: they change the weights
    for name in names:
        run(model, sequences[:1, :16], name)
    seconds = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            start = time.process_time()
            run(model, sequences, name)
            seconds[name].append(time.process_time() - start)
    del model
    print(
        f"{args.sequences} sequences of {args.length} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name in names:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["forward"], strict=True))
        low, high = ratios[0], ratios[-1]
        print(
            f"  {name:<22} {statistics.median(ratios):5.2f} forward passes (min {low:.2f}, max {high:.2f})   "
            f"peak {memory(name, args):7.1f} MiB beyond the loaded model"
        )


if __name__ == "__main__":
    main()
