"""Score a model, look at the scores, prune it with indices of your own, save and reload it; no Trainer.

Usage: python examples/notebook.py MODEL OUT
"""

import sys

import torch

import hfprune

model = hfprune.load(sys.argv[1])
generator = torch.Generator().manual_seed(0)
batches = [torch.randint(3, model.config.vocab_size, (4, 32), generator=generator) for _ in range(4)]  # your token ids

scores = hfprune.score(model, batches)  # layer -> importance [U]
for layer, importance in scores.items():
    share = float(importance.topk(len(importance) // 10 or 1).values.sum() / importance.sum())
    print(f"{layer}: {len(importance)} neurons, the top tenth holds {share:.0%} of the importance")

keep = {layer: importance.topk(len(importance) * 3 // 4).indices for layer, importance in scores.items()}
plan = hfprune.make_plan(model, keep=keep)  # or hfprune.make_plan(model, scores, budget=0.2)
errors = hfprune.refit(model, plan, batches)  # least squares, layer by layer
hfprune.apply_plan(model, plan)
saved = hfprune.save(model, sys.argv[2], plan=plan)

again = hfprune.load(sys.argv[2])
print(f"{saved['parameters']:,} parameters; largest error of a refitted layer {max(errors.values()):.1%}")
assert torch.equal(again(batches[0]).logits, model.eval()(batches[0]).logits)
