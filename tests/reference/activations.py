"""Scores from activations by the long way: every token's inputs and outputs kept, loops in float64."""

import math

import torch


def record(model, sequences, modules):
    """{module: (inputs [T, in], outputs [T, out])} over all tokens of all sequences."""
    seen = {name: ([], []) for name in modules}
    handles = []
    for name in modules:

        def keep(module, args, output, name=name):
            seen[name][0].append(args[0].reshape(-1, args[0].shape[-1]))
            seen[name][1].append(output.reshape(-1, output.shape[-1]))

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(x), torch.cat(y)) for name, (x, y) in seen.items()}


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def activation_norm(unit, seen, tokens):
    """A unit is a list of (parameter, is it rows, channels); consumers are those that are not rows."""
    values = [v for name, rows, cs in unit if not rows for c in cs for v in column(seen, name, c)]
    return norm(values) / math.sqrt(tokens)


def column(seen, parameter, channel):
    return seen[parameter.removesuffix(".weight")][0][:, channel].tolist()


def wanda(unit, weights, seen, tokens, *, producers):
    total = 0.0
    for name, rows, channels in unit:
        w = weights[name]
        if rows and producers:
            norms = [norm(column(seen, name, k)) / math.sqrt(tokens) for k in range(w.shape[1])]
            total += sum(abs(float(w[c, k])) * norms[k] for c in channels for k in range(w.shape[1]))
        if not rows:
            for c in channels:
                size = norm(column(seen, name, c)) / math.sqrt(tokens)
                total += sum(abs(float(w[i, c])) for i in range(w.shape[0])) * size
    return total


def weight_range(units, weights, seen, tokens):
    """All units of a group: the ranges are divided by the largest of their matrix."""
    scores = [0.0] * len(units)
    for m in range(len(units[0])):
        ranges = []
        for unit in units:
            name, rows, channels = unit[m]
            owned = [v for c in channels for v in (weights[name][c] if rows else weights[name][:, c]).tolist()]
            ranges.append(max(owned) + abs(min(owned)))
        scores = [s + r / max(ranges) for s, r in zip(scores, ranges, strict=True)]
    return [s * activation_norm(unit, seen, tokens) for s, unit in zip(scores, units, strict=True)]


def slimllm_channel(unit, weights, seen, *, drop=()):
    """I_g + I_u + I_d of a neuron: principal directions from a singular value decomposition of the centred outputs."""
    total = 0.0
    for name, rows, (j,) in unit:
        if name.endswith(tuple(drop)) and drop:
            continue
        if rows:
            w = weights[name][j].tolist()
            total += norm(v * norm(column(seen, name, k)) for k, v in enumerate(w))
        else:
            outputs = seen[name.removesuffix(".weight")][1]
            _, s, v = torch.linalg.svd(outputs - outputs.mean(0), full_matrices=True)
            values = [float(x) ** 2 for x in s] + [0.0] * (v.shape[0] - len(s))
            mean = sum(values) / len(values)
            d = weights[name][:, j]
            terms = [abs(float(d @ v[i])) / (1 + math.exp(-value / mean)) for i, value in enumerate(values)]
            total += norm(column(seen, name, j)) * norm(terms)
    return total


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / len(x)
    vx, vy = sum((a - mx) ** 2 for a in x) / len(x), sum((b - my) ** 2 for b in y) / len(y)
    return cov / math.sqrt(vx * vy)


def head_correlation(units, weights, seen, kept):
    """R: the sum over output dimensions of abs(Pearson) between the contributions of ``kept`` and of all units."""
    name = next(name for name, rows, _ in units[0] if not rows)
    inputs, w = seen[name.removesuffix(".weight")][0], weights[name]
    contributions = []
    for unit in units:
        (channels,) = (cs for _, rows, cs in unit if not rows)
        contributions.append(sum(inputs[:, c, None] * w[None, :, c] for c in channels))
    some, everything = sum(contributions[u] for u in kept), sum(contributions)
    return sum(abs(pearson(some[:, d].tolist(), everything[:, d].tolist())) for d in range(w.shape[0]))


def head_scores(units, weights, seen):
    n = len(units)
    hidden = next(weights[name].shape[0] for name, rows, _ in units[0] if not rows)
    return [hidden - head_correlation(units, weights, seen, [u for u in range(n) if u != i]) for i in range(n)]


def refined(units, weights, seen, count):
    """The kept units after SlimLLM's exchanges."""
    scores = head_scores(units, weights, seen)
    order = sorted(range(len(units)), key=lambda u: scores[u])
    dropped, kept = order[:count], order[count:]
    best = head_correlation(units, weights, seen, kept)
    for u in dropped:
        trials = [[*kept[:i], u, *kept[i + 1 :]] for i in range(len(kept))]
        values = [head_correlation(units, weights, seen, trial) for trial in trials]
        if max(values) > best:
            best = max(values)
            kept = trials[values.index(best)]
    return sorted(kept)
