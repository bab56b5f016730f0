"""Calibration of a large model on one GPU, each part next to a bare pass of the same model in the same run.

    python benchmarks/gpu.py --results gpu.jsonl                    # Llama-2-7B's shapes, random weights, bfloat16
    python benchmarks/gpu.py --toy --results toy.jsonl              # a tiny model on the CPU: does the script run?

Parts, on the same token ids, 128 sequences of 2048 tokens by default:

- ``forward``: one forward pass without gradients and without the output head;
- ``gradient``: frozen weights; forward pass, head, entropy in closed form, backward pass to the embeddings, no hooks;
- ``entropy``: HFPrune's scores (per-token activation Taylor, entropy objective), one sequence a step (exact sums);
- ``entropy_batched``: the same with several sequences a step;
- ``activation_norm``: scores of a forward pass;
- ``least_squares``: the fit of every down projection at 80 % of its width, layer by layer;
- ``curves``: KL at three kept shares of every layer, on ``--curve_sequences`` sequences.

Every part prints one JSON line: seconds, tokens/s, model FLOP utilisation (2 FLOPs a parameter and token of a forward
pass, 4 with activation gradients; against ``--peak_tflops``), peak memory beyond the loaded model, and the ratio to
its bare pass. Parts whose line is in ``--results`` are skipped, so an interrupted run goes on with the same command.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune.compensation import LeastSquares
from hfprune.criteria import ActivationNorm, ActivationTaylor
from hfprune.models import backbone, find_groups, output_head, parameter_count
from hfprune.models.forward import run_backbone
from hfprune.objectives import OBJECTIVES, chunked_objective
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum
from hfprune.pruning.layerwise import LayerwisePass
from hfprune.pruning.sensitivity_curves import kl_curves

COLUMNS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "7b": (32000, 4096, 11008, 32, 32),
    "1b": (128256, 2048, 8192, 16, 32),
    "toy": (512, 64, 176, 3, 4),
}
BARE = {
    "entropy": "gradient",
    "entropy_batched": "gradient_batched",
    "activation_norm": "forward",
    "least_squares": "forward",
}
FLOPS = {"forward": 2, "gradient": 4, "gradient_batched": 4, "entropy": 4, "entropy_batched": 4, "activation_norm": 2}


def build(args):
    """Returns the model with random weights, in eval mode, and the token ids [N, T]."""
    torch.manual_seed(0)
    shapes = dict(zip(COLUMNS, SHAPES[args.shapes], strict=True))
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    config = LlamaConfig(**shapes, max_position_embeddings=args.length, attn_implementation="sdpa")
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    ids = torch.randint(3, config.vocab_size, (args.sequences, args.length), generator=torch.Generator())
    return model.eval().requires_grad_(False), ids.to(args.device)


def entropy_sum(model, ids):
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    total = chunked_objective(OBJECTIVES.get("entropy"), hidden, output_head(model))
    return ObjectiveSum(total=total, num_tokens=torch.full((len(ids),), ids.shape[1]), padding=None)


def forward(model, ids, args, found):
    for one in ids.split(args.rows):
        run_backbone(model, {"input_ids": one})


def gradient(model, ids, args, found, rows=1):
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    for one in ids.split(rows):
        entropy_sum(model, one).total.backward()
    handle.remove()


def gradient_batched(model, ids, args, found):
    gradient(model, ids, args, found, rows=args.rows)


def entropy(model, ids, args, found, rows=1):
    accumulator = ImportanceAccumulator(model, find_groups(model), ActivationTaylor())
    with accumulator.recording():
        for one in ids.split(rows):
            accumulator.step(lambda one=one: entropy_sum(model, one))
    found["scores"] = accumulator.scores()


def entropy_batched(model, ids, args, found):
    entropy(model, ids, args, found, rows=args.rows)


def activation_norm(model, ids, args, found):
    accumulator = ImportanceAccumulator(model, find_groups(model), ActivationNorm())
    with accumulator.recording():
        for one in ids.split(args.rows):
            tokens = torch.full((len(one),), one.shape[1])
            accumulator.observe(lambda one=one: run_backbone(model, {"input_ids": one}), tokens, None)
    found["scores"] = accumulator.scores()


def least_squares(model, ids, args, found):
    groups = find_groups(model)
    if "scores" not in found:
        activation_norm(model, ids[:1], args, found)
    keep = {
        g.name: tuple(sorted(found["scores"][g.name].topk(int(g.num_units * 0.8)).indices.tolist())) for g in groups
    }
    batches = [{"input_ids": one[None]} for one in ids]
    LayerwisePass(model, groups, compensation=LeastSquares()).run(
        batches, {name: len(kept) for name, kept in keep.items()}, keep=keep
    )


def curves(model, ids, args, found):
    if "scores" not in found:
        activation_norm(model, ids[:1], args, found)
    batches = [{"input_ids": one[None]} for one in ids[: args.curve_sequences]]
    kl_curves(model, find_groups(model), found["scores"], batches, (0.9, 0.7, 0.5))


PARTS = (forward, gradient, gradient_batched, entropy, entropy_batched, activation_norm, curves, least_squares)


def measure(part, model, ids, args, found):
    """Runs a part once on one or two sequences to warm up, then on all; returns seconds and peak bytes."""
    cuda = args.device == "cuda"
    if part is not least_squares:  # it changes the weights
        part(model, ids[: args.rows], args, dict(found))
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    base, start = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
    part(model, ids, args, found)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - base if cuda else None


def profile(part, model, ids, args):
    """Prints where the time of a few sequences goes, by kernel."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as found:
        part(model, ids[: 2 * args.rows], args, {})
    sort = "cuda_time_total" if args.device == "cuda" else "cpu_time_total"
    print(found.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=70), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a part")
    parser.add_argument("--shapes", default="7b", choices=list(SHAPES))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4, help="sequences a step of the batched parts")
    parser.add_argument("--curve_sequences", type=int, default=4)
    parser.add_argument("--only", default="", help="parts, separated by commas; all of them if not given")
    parser.add_argument("--profile", default="", help="print kernels of these parts instead of timing them")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="dense bfloat16 peak of the card")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    args.device = "cpu" if args.toy else "cuda"
    if args.toy:
        args.shapes, args.sequences, args.length = "toy", 8, 64
    lines = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    rows = {row["part"]: row for row in lines}
    model, ids = build(args)
    chosen = [part for part in PARTS if not args.only or part.__name__ in args.only.split(",")]
    if args.profile:
        for part in PARTS:
            if part.__name__ in args.profile.split(","):
                profile(part, model, ids, args)
        return
    parameters = parameter_count(model) - model.get_input_embeddings().weight.numel()
    found = {}
    for part in chosen:
        name = part.__name__
        if name in rows:
            continue
        seconds, peak = measure(part, model, ids, args, found)
        row = {"part": name, "shapes": args.shapes, "seconds": seconds}
        row["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        row["peak_gib"] = None if peak is None else peak / 2**30
        row["tokens_per_second"] = (args.curve_sequences * args.length if part is curves else ids.numel()) / seconds
        if name in FLOPS:
            row["mfu"] = FLOPS[name] * parameters * ids.numel() / seconds / (args.peak_tflops * 1e12)
        if BARE.get(name) in rows:
            row["ratio"] = seconds / rows[BARE[name]]["seconds"]
        rows[name] = row
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
