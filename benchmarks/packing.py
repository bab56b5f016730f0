"""Packed against unpacked recovery steps on instruction data: real tokens a second, in one run.

    python benchmarks/packing.py --data alpaca.json.gz     # SmolLM2-135M, 24 examples, rows of 512 tokens, 2 rounds

What recovery costs: forward and backward passes for LoRA of rank 8 on all linear layers, the same examples both ways,
unpacked in padded batches of ``--batch_size`` examples, packed in batches of ``--packed_batch_size`` rows. Padding is
not counted as tokens. Each round runs both, in turn; the ratio is the median of the rounds' ratios. Losses per
supervised token are compared as well.
"""

import argparse
import statistics
import time

from hfprune.data import TextDataModule
from hfprune.io.load import load_causal_lm, load_tokenizer, max_positions
from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES
from hfprune.recovery import LoraRecovery
from hfprune.recovery.lora import add_lora


def batches(args, tokenizer, model, *, packing):
    data = TextDataModule(
        recovery=args.data,
        seq_len=args.seq_len,
        recovery_sequences=args.examples,
        batch_size=args.packed_batch_size if packing else args.batch_size,
        packing=packing,
        eval_windows=0,
    )
    data.bind(tokenizer, vocab_size=model.config.vocab_size, max_positions=max_positions(model.config))
    return list(data.train_dataloader())


def epoch(model, found, clock):
    """Returns the loss per supervised token, and the seconds that forward and backward passes took."""
    start, total, count = clock(), 0.0, 0
    for batch in found:
        loss, valid = objective_sum(model.get_base_model(), OBJECTIVES.get("cross_entropy"), batch)
        loss.backward()
        total, count = total + loss.item(), count + int(valid.sum())
    model.zero_grad()
    return total / count, clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="instructions in Alpaca layout")
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--packed_batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: where others use the machine too"
    )
    args = parser.parse_args()
    model, tokenizer = load_causal_lm(args.model, dtype="float32"), load_tokenizer(args.model)
    kinds = {name: batches(args, tokenizer, model, packing=name == "packed") for name in ("unpacked", "packed")}
    model = add_lora(model, LoraRecovery(rank=8, alpha=16, dropout=0.0), seed=0).train()
    tokens = {name: sum(int(b["attention_mask"].sum()) for b in found) for name, found in kinds.items()}
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    epoch(model, kinds["packed"][:1], clock)
    rates, losses = {name: [] for name in kinds}, {}
    for _ in range(args.rounds):
        for name, found in kinds.items():
            losses[name], seconds = epoch(model, found, clock)
            rates[name].append(tokens[name] / seconds)
    for name, found in kinds.items():
        places = sum(b["input_ids"].numel() for b in found)
        print(
            f"{name:<9} {len(found):>3} batches, {tokens[name]:,} tokens in {places:,} places "
            f"({tokens[name] / places:.0%}), {statistics.median(rates[name]):.1f} tokens/s, loss {losses[name]:.6f}"
        )
    ratios = [p / u for p, u in zip(rates["packed"], rates["unpacked"], strict=True)]
    every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"packed / unpacked tokens/s: {statistics.median(ratios):.2f} (rounds: {every})")


if __name__ == "__main__":
    main()
