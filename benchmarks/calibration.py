"""Calibration time and peak memory beside a straightforward reference and a lower bound, in one run.

    python benchmarks/calibration.py                    # SmolLM2-135M, 8 sequences of 256 tokens, 5 rounds
    python benchmarks/calibration.py --part flat        # memory against vocabulary and number of sequences

Variants, all on the same tokens, one sequence a step, entropy objective, per-token activation Taylor:

- ``hfprune``: frozen weights, chunked closed-form head, hooks that accumulate inside the backward pass;
- ``reference``: what HFPrune's code does: every MLP weight trainable, all logits through autograd;
- ``bound``: frozen weights, chunked closed-form head, forward and backward to the embeddings, no hooks, no scores;
- ``forward``: one forward pass without gradients, all logits (memory baseline).

Time is measured in alternation inside one process and given as the median of per-round ratios. Peak memory is the
resident high-water mark of a process of its own per variant, above what the loaded model takes.
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
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune.allocation import uniform_keep
from hfprune.criteria import ActivationTaylor
from hfprune.io.load import load_causal_lm
from hfprune.models import backbone, find_groups, output_head
from hfprune.objectives import OBJECTIVES, chunked_objective
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum


def entropy_sum(model, ids):
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    total = chunked_objective(OBJECTIVES.get("entropy"), hidden, output_head(model))
    return ObjectiveSum(total=total, num_tokens=torch.tensor([ids.shape[1]]), padding=None)


def run_hfprune(model, sequences):
    accumulator = ImportanceAccumulator(model, find_groups(model), ActivationTaylor(weighting="sequence"))
    with accumulator.recording():
        for ids in sequences:
            accumulator.step(lambda ids=ids: entropy_sum(model, ids[None]))
    return accumulator.scores()


def run_reference(model, sequences):
    groups = find_groups(model)
    consumers = {g.name: model.get_submodule(g.inputs()[0].module) for g in groups}
    for name, p in model.named_parameters():
        p.requires_grad_(".mlp." in name)
    scores = {g.name: torch.zeros(g.num_units, dtype=torch.float64) for g in groups}
    inputs, grads = {}, {}
    handles = []
    for name, module in consumers.items():
        handles.append(
            module.register_forward_hook(lambda m, args, out, n=name: inputs.__setitem__(n, args[0].detach()))
        )
        handles.append(module.register_full_backward_hook(lambda m, gi, go, n=name: grads.__setitem__(n, gi[0])))
    for ids in sequences:
        model.zero_grad()
        log_p = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits.float(), dim=-1)
        (-(log_p.exp() * log_p).sum(-1).mean()).backward()
        for name in scores:
            scores[name] += (inputs[name] * grads[name]).abs().sum(dim=(0, 1)) / len(sequences)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model.requires_grad_(False)
    return scores


def run_bound(model, sequences):
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    for ids in sequences:
        entropy_sum(model, ids[None]).total.backward()
    handle.remove()


def run_forward(model, sequences):
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=ids[None], use_cache=False)


VARIANTS = {"hfprune": run_hfprune, "reference": run_reference, "bound": run_bound, "forward": run_forward}


def load(args):
    if args.vocab:
        config = LlamaConfig(vocab_size=args.vocab, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = load_causal_lm(args.model, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, model.config.vocab_size, (args.sequences, args.length), generator=generator)
    return model.eval().requires_grad_(False), sequences


def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_memory(args):
    """Runs in a process of its own: prints the peak beyond the loaded model, in MiB."""
    model, sequences = load(args)
    run_forward(model, sequences[:1, :8])  # allocate what any run allocates once
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    VARIANTS[args.memory](model, sequences)
    print(json.dumps(peak_mib() - before))


def memory(variant, args, **override):
    values = vars(args) | override
    flags = [f"--{k}={v}" for k, v in values.items() if k in ("model", "sequences", "length", "vocab", "threads") and v]
    command = [sys.executable, __file__, f"--memory={variant}", *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(args):
    model, sequences = load(args)
    kept = {}
    for name in ("hfprune", "reference"):
        scores = VARIANTS[name](model, sequences)
        kept[name] = uniform_keep(scores, find_groups(model), find_groups(model)[0].num_units * 2 // 3)
    run_bound(model, sequences[:1])
    seconds = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, variant in VARIANTS.items():
            start = time.perf_counter()
            variant(model, sequences)
            seconds[name].append(time.perf_counter() - start)
    del model
    peaks = {name: memory(name, args) for name in VARIANTS}

    def ratio(a, b):
        ratios = sorted(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        return f"{statistics.median(ratios):.3f} (min {ratios[0]:.3f}, max {ratios[-1]:.3f})"

    print(
        f"{args.sequences} sequences of {args.length} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name, values in seconds.items():
        print(f"  {name:<10} {statistics.median(values):7.2f} s   peak {peaks[name]:8.1f} MiB beyond the loaded model")
    print(f"kept sets equal: {kept['hfprune'] == kept['reference']}")
    print(f"time hfprune / reference: {ratio('hfprune', 'reference')}")
    print(f"time hfprune / bound:     {ratio('hfprune', 'bound')}")
    beyond = {name: peaks[name] - peaks["forward"] for name in peaks}
    print(
        f"memory beyond a bare forward pass: hfprune {beyond['hfprune']:.1f} MiB, reference {beyond['reference']:.1f} "
        f"MiB, ratio {beyond['hfprune'] / beyond['reference']:.3f}"
    )


def flat(args):
    base = None
    for vocab in (8_000, 32_000, 128_000, 256_000):
        # long enough that the reference's logits would not fit one chunk at any of these vocabularies
        peak = memory("hfprune", args, vocab=vocab, sequences=4, length=2048)
        base = base or peak
        whole = 2048 * vocab * 4 / 2**20
        print(
            f"vocabulary {vocab:>7,}: peak {peak:7.1f} MiB beyond the loaded model, ratio {peak / base:.2f} "
            f"(the logits of one sequence: {whole:,.0f} MiB)"
        )
    base = None
    for sequences in (16, 64, 256, 1024):
        peak = memory("hfprune", args, vocab=8_000, sequences=sequences)
        base = base or peak
        print(f"sequences  {sequences:>7,}: peak {peak:7.1f} MiB beyond the loaded model, ratio {peak / base:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=0, help="a tiny random model with this vocabulary instead")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--part", choices=("compare", "flat", "all"), default="compare")
    parser.add_argument("--memory", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        measure_memory(args)
        return
    if args.part in ("compare", "all"):
        compare(args)
    if args.part in ("flat", "all"):
        flat(args)


if __name__ == "__main__":
    main()
