"""What the scores estimate, measured: the figures of docs/theory.md.

    python benchmarks/theory.py --out docs/figures      # SmolLM2-135M, 8 sequences of 256 tokens

Single neurons of every layer, spread over the ranks of their Fisher scores, are set to zero one at a time, and whole
shares of each layer by several scores; KL to the dense model, the change of the mean entropy and of the cross-entropy
are measured on the sequences that gave the scores. Prints JSON; draws ``theory_units.svg`` and ``theory_shares.svg``.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from hfprune.allocation import uniform_keep
from hfprune.criteria import ActivationTaylor, Fisher
from hfprune.data import TextDataModule
from hfprune.io.load import load_causal_lm, load_tokenizer
from hfprune.models import find_groups
from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum
from hfprune.pruning.hooks import UnitMask
from hfprune.report.style import BLUE, MUTED, RED, new_figure, styled
from hfprune.sweep.results import rank_correlation

SCORES = {
    "entropy": (ActivationTaylor(), "entropy"),
    "entropy, signed": (ActivationTaylor(reduction="signed"), "entropy"),
    "cross-entropy": (ActivationTaylor(), "cross_entropy"),
    "Fisher": (Fisher(), "sampled"),
    "Fisher, per sequence": (Fisher(reduction="per_sequence"), "sampled"),
}
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4)


def calibrate(model, sequences, criterion, objective):
    accumulator = ImportanceAccumulator(model, find_groups(model), criterion)
    with accumulator.recording():
        for ids in sequences:

            def step(ids=ids):
                total, valid = objective_sum(model, OBJECTIVES.get(objective), {"input_ids": ids[None]})
                return ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=None)

            accumulator.step(step)
    return accumulator.scores()


class Effects:
    """KL, change of entropy and of cross-entropy, nats per token, against the dense model's own predictions."""

    def __init__(self, model, sequences):
        self.model, self.sequences = model, sequences
        self.dense = [self._log_probs(ids) for ids in sequences]

    @torch.no_grad()
    def _log_probs(self, ids):
        return self.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)

    def of(self, keep):
        totals = torch.zeros(3, dtype=torch.float64)
        with UnitMask(self.model, find_groups(self.model), keep).active():
            for ids, p in zip(self.sequences, self.dense, strict=True):
                q = self._log_probs(ids)
                change = [-(x.exp() * x).sum(dtype=torch.float64) for x in (q, p)]
                losses = [cross_entropy(x[:-1], ids[1:], reduction="sum").double() for x in (q, p)]
                kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
                totals += torch.stack([kl, change[0] - change[1], losses[0] - losses[1]])
        return [value / sum(map(len, self.sequences)) for value in totals.tolist()]


def spearman(x, y):
    return rank_correlation({"": torch.tensor(x)}, {"": torch.tensor(y)})


def single_units(model, effects, scores, count):
    groups = find_groups(model)
    everything = {g.name: range(g.num_units) for g in groups}
    found = []
    for number in range(count):
        group = groups[number * len(groups) // count]
        order = scores["Fisher"][group.name].argsort(descending=True)
        unit = int(order[(number * 389) % len(order) if number % 2 else number % 12])  # half of them among the largest
        kept = [u for u in range(group.num_units) if u != unit]
        kl, entropy, ce = effects.of(everything | {group.name: kept})
        mine = {name: float(by_group[group.name][unit]) for name, by_group in scores.items()}
        found.append({"group": group.name, "unit": unit, "kl": kl, "entropy": entropy, "ce": ce, "scores": mine})
    return found


def shares(model, effects, scores):
    groups = find_groups(model)
    found = {}
    for name in ("entropy", "cross-entropy", "Fisher"):
        for share in SHARES:
            widths = [round(g.num_units * (1 - share)) for g in groups]
            found.setdefault(name, []).append([share, *effects.of(uniform_keep(scores[name], groups, widths))])
    return found


def draw_units(units, path):
    panels = [
        ("half the Fisher score", lambda u: u["scores"]["Fisher"] / 2, "KL", lambda u: u["kl"]),
        (
            "signed entropy score",
            lambda u: u["scores"]["entropy, signed"],
            "|change of entropy|",
            lambda u: abs(u["entropy"]),
        ),
        ("entropy score", lambda u: u["scores"]["entropy"], "KL", lambda u: u["kl"]),
    ]
    with styled():
        figure = new_figure(9.6, 3.2)
        for axes, (x_name, x, y_name, y) in zip(figure.subplots(1, 3), panels, strict=True):
            xs, ys = [x(u) for u in units], [y(u) for u in units]
            axes.loglog(xs, ys, "o", color=BLUE, markersize=4)
            ends = [max(min(xs), min(ys)), min(max(xs), max(ys))]
            axes.loglog(ends, ends, color=MUTED, linewidth=1)
            axes.set(xlabel=f"{x_name}, nats/token", ylabel=f"{y_name}, nats/token")
            axes.set_title(f"rank correlation {spearman(xs, ys):.2f}")
        figure.savefig(path, metadata={"Date": None})


def draw_shares(found, path):
    with styled():
        figure = new_figure(6.4, 3.0)
        left, right = figure.subplots(1, 2)
        for (name, rows), color in zip(found.items(), (BLUE, MUTED, RED), strict=True):
            left.plot([100 * r[0] for r in rows], [r[1] for r in rows], "o-", color=color, label=name)
            right.plot([100 * r[0] for r in rows], [r[2] for r in rows], "o-", color=color, label=name)
        for axes, label in ((left, "KL, nats/token"), (right, "change of the mean entropy, nats/token")):
            axes.set(xlabel="neurons removed in every layer, %", ylabel=label)
        left.set_yscale("log")
        right.axhline(0, color=MUTED, linewidth=0.8)
        left.legend()
        figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--out", default="theory")
    c = parser.parse_args()
    model = load_causal_lm(c.model, dtype="float32").eval()
    data = TextDataModule(
        calibration=c.text,
        seq_len=c.length,
        calibration_sequences=c.sequences,
        calibration_batch_size=1,
        eval_windows=0,
    )
    data.bind(load_tokenizer(c.model), vocab_size=model.config.vocab_size, max_positions=None)
    sequences = [batch["input_ids"][0] for batch in data.calibration_dataloader()]
    scores = {name: calibrate(model, sequences, *pair) for name, pair in SCORES.items()}
    effects = Effects(model, sequences)
    units = single_units(model, effects, scores, c.units)
    by_share = shares(model, effects, scores)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_units(units, out / "theory_units.svg")
    draw_shares(by_share, out / "theory_shares.svg")
    correlations = {a: {b: round(rank_correlation(scores[a], scores[b]), 3) for b in scores} for a in scores}
    of_units = {
        name: {
            "kl": round(spearman([u["scores"][name] for u in units], [u["kl"] for u in units]), 3),
            "entropy": round(spearman([u["scores"][name] for u in units], [abs(u["entropy"]) for u in units]), 3),
        }
        for name in scores
    }
    ratio = sorted(u["kl"] / (u["scores"]["Fisher"] / 2) for u in units)
    print(
        json.dumps(
            {
                "rank_correlation_of_scores": correlations,
                "rank_correlation_with_measured": of_units,
                "kl_over_half_fisher_quartiles": [ratio[len(ratio) * k // 4] for k in (1, 2, 3)],
                "shares": by_share,
                "units": units,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
