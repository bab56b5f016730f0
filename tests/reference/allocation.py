"""Slow references of allocations: plain loops, one unit at a time."""

import itertools
import math
import statistics


def ranked_removal(scores, costs, removal, *, comparable, bounds):
    """Returns the kept units of each group after removing the lowest-scored unit of all again and again.

    Args:
        scores: One list of scores per group.
        costs: Parameters of one unit, per group.
        removal: Parameters to remove.
        comparable: As in GlobalRank.
        bounds: Fewest and most units that a group keeps.
    """
    low, high = bounds

    def value(g, u):
        mean = statistics.fmean(scores[g])
        if comparable == "per_parameter":
            return scores[g][u] / costs[g]
        if comparable == "mean":
            return scores[g][u] / mean
        if comparable == "standard":
            return (scores[g][u] - mean) / statistics.pstdev(scores[g])
        return scores[g][u]

    kept = [set(range(len(s))) for s in scores]
    for g, units in enumerate(kept):
        while len(units) > high:
            units.remove(min(units, key=lambda u: value(g, u)))
            removal -= costs[g]
    while True:
        open_to = [(value(g, u), g, -u) for g, units in enumerate(kept) if len(units) > low for u in units]
        _, g, u = min(open_to)
        if abs(removal - costs[g]) >= abs(removal):
            return [sorted(units) for units in kept]
        kept[g].remove(-u)
        removal -= costs[g]


def softmax_shares(cosines, *, alpha, number, share):
    """Returns r n softmax(alpha c) of the layers with the largest cosines, 0 for the others."""
    chosen = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:number]
    total = sum(math.exp(alpha * cosines[i]) for i in chosen)
    return [share * number * math.exp(alpha * c) / total if i in chosen else 0.0 for i, c in enumerate(cosines)]


def cheapest_pieces(curves, units, cost, removal):
    """Returns the widths after removing units one by one, each where the piecewise linear curve rises least.

    Args:
        curves: Per group, kept share -> KL; convex.
        units: Units per group.
        cost: Parameters of one unit.
        removal: Parameters to remove.
    """

    def kl(g, width):
        known = sorted((curves[g] | {1.0: 0.0}).items())
        share = width / units[g]
        for (a, at), (b, bt) in itertools.pairwise(known):
            if a <= share <= b:
                return at + (bt - at) * (share - a) / (b - a)
        return math.inf

    widths = list(units)
    while removal > 0:
        rises = [(round(kl(g, w - 1) - kl(g, w), 12), g) for g, w in enumerate(widths) if w > 1]
        g = min(rises)[1]
        widths[g] -= 1
        removal -= cost
    return widths
