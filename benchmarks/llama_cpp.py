"""Pruned models in llama.cpp on one CPU thread: size on disk and tokens a CPU second, compared with the dense model.

    python benchmarks/llama_cpp.py --engine .venv-llama-cpp/bin/python     # SmolLM2-135M, q8_0 and q4_0, 9 rounds

``--engine`` is a python that has the package xllamacpp (``make serve-llama-cpp``). The model is pruned by
activation norms of a little text to one odd width, to a multiple of 256, and to widths per layer (GlobalRank) with and
without ``round_to=256``; ``padded`` has the widths per layer of the first, filled with zeros. A round is a prompt of
128 tokens and 48 single tokens; the models take turns within one process, and the table has medians. First, greedy
tokens of the widths per layer in float32 are compared with those of transformers: 3 prompts, 32 tokens each.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

import hfprune
from hfprune.allocation import GlobalRank
from hfprune.criteria import ActivationNorm
from hfprune.io.gguf import export_gguf
from hfprune.io.layouts.stock import pad
from hfprune.io.load import load_causal_lm, load_tokenizer
from hfprune.models import mlp_widths
from hfprune.plan import Budget

ENGINE = Path(__file__).parents[1] / "tests" / "helpers" / "llama_cpp_engine.py"
PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a small village,")


def engine(python, jobs):
    """Runs jobs in the engine; see its module."""
    done = subprocess.run([python, str(ENGINE)], input=json.dumps(jobs), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def calibration(tokenizer, sequences, length):
    """Returns batches of one sequence each, of Python's documentation."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n".join(topics.values()))["input_ids"]
    return [torch.tensor([ids[i * length : (i + 1) * length]]) for i in range(sequences)]


def same_tokens(python, model, tokenizer, path):
    """Returns how many of 96 greedy tokens agree with transformers, in float32."""
    export_gguf(model, tokenizer, path, gguf_type="f32")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    (found,) = engine(python, [{"do": "generate", "model": str(path), "prompts": prompts, "tokens": 32}])
    path.unlink()
    count = 0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        own = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        count += sum(a == b for a, b in zip(own, answer["tokens"], strict=True))
    return count


def models(args, tokenizer):
    """Yields name and model: dense, odd and rounded widths, widths per layer, and these padded."""
    dense = load_causal_lm(args.model, dtype="float32")
    yield "dense", dense
    batches = calibration(tokenizer, args.sequences, args.seq_len)
    scores = hfprune.score(dense, batches, ActivationNorm())
    plans = {
        f"width {width}": hfprune.make_plan(dense, keep={name: s.topk(width).indices for name, s in scores.items()})
        for width in args.widths
    }
    plans["per layer"] = hfprune.make_plan(dense, scores, budget=args.ratio, allocation=GlobalRank())
    rounded = Budget(pruning_ratio=args.ratio, round_to=256)
    plans["per layer, round_to=256"] = hfprune.make_plan(dense, scores, budget=rounded, allocation=GlobalRank())
    for name, plan in plans.items():
        model = load_causal_lm(args.model, dtype="float32")
        hfprune.apply_plan(model, plan)
        yield name, model
        if name == "per layer":
            yield "per layer, padded", pad(model)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="a python with xllamacpp")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--types", default="q8_0,q4_0", help="types of the files, separated by commas")
    parser.add_argument("--widths", type=int, nargs="+", default=[1017, 1024])
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the parameters that widths per layer lose")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    tokenizer, kinds, sizes = load_tokenizer(args.model), args.types.split(","), {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: {} for kind in kinds}
        for name, model in models(args, tokenizer):
            widths = mlp_widths(model)
            if name == "per layer":
                count = same_tokens(args.engine, model, tokenizer, Path(folder) / "f32.gguf")
                print(
                    f"{name}: widths {min(widths)} to {max(widths)}, {count} of 96 greedy tokens as in transformers\n"
                )
            for kind in kinds:
                path = Path(folder) / f"{name}-{kind}.gguf"
                sizes[name, kind] = export_gguf(model, tokenizer, path, gguf_type=kind)["bytes"] / 2**20
                paths[kind][name] = str(path)
        speed = {"do": "speed", "prompt": args.prompt, "tokens": args.tokens, "rounds": args.rounds}
        found = dict(zip(kinds, engine(args.engine, [speed | {"models": paths[k]} for k in kinds]), strict=True))
    print("| model | " + " | ".join(f"{k} MiB | prompt tokens/s | decoded tokens/s" for k in kinds) + " |")
    print("|---" * (1 + 3 * len(kinds)) + "|")
    for name in paths[kinds[0]]:
        cells = []
        for kind in kinds:
            seconds = {part: statistics.median(times) for part, times in found[kind][name].items()}
            cells += [f"{sizes[name, kind]:.1f}", f"{args.prompt / seconds['prompt']:.0f}"]
            cells.append(f"{args.tokens / seconds['tokens']:.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
