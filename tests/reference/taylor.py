"""Taylor scores of units by the long way: whole logits, autograd into every weight, loops over units and weights.

Groups are plain data: name -> per unit, per matrix: (parameter name, is it rows, channels). Float64 throughout.
"""

import math

import torch

from tests.reference.scores import sequence_objective


def mean_gradients(model, sequences, loss):
    """For every sequence, {parameter name: gradient of its mean objective}.

    ``loss(model, ids)`` returns the sum and the number of tokens. The sum is differentiated: Llama's norms run in float32
    even in a float64 model, and round a scaled gradient otherwise.
    """
    found = []
    model.eval().requires_grad_(True)
    for ids in sequences:
        model.zero_grad()
        total, tokens = loss(model, ids)
        total.backward()
        found.append({name: p.grad / tokens for name, p in model.named_parameters() if p.grad is not None})
    return found


def objective_of(objective):
    def loss(model, ids):
        return sequence_objective(model(input_ids=ids[None]).logits[0], ids, objective)

    return loss


def vectors(table, unit):
    """The vectors of a unit's matrix: (row or column of values) for every channel."""
    name, rows, channels = unit
    return [(table[name][c] if rows else table[name][:, c]).reshape(-1).tolist() for c in channels]


def llm_pruner(model, sequences, objective, groups, salience, *, gradient="sequence", matrices="sum"):
    """LLM-Pruner's scores; ``gradient`` says whether the absolute value is taken per sequence or at the end."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    per_sequence = mean_gradients(model, sequences, objective_of(objective))
    n = len(per_sequence)
    whole = {name: sum(g[name] for g in per_sequence) / n for name in per_sequence[0]}
    square = {name: sum(g[name] ** 2 for g in per_sequence) / n for name in per_sequence[0]}

    def channel(w, g, h, each):
        if salience == "vectorize":
            return abs(sum(a * b for a, b in zip(w, g, strict=True)))
        if salience == "param_second":
            return sum(a * a * b for a, b in zip(w, h, strict=True))
        half = 0.5 if salience == "param_mix" else 0.0
        if gradient == "dataset":
            return sum(abs(a * b - half * a * a * c) for a, b, c in zip(w, g, h, strict=True))
        return sum(sum(abs(a * b - half * a * a * b * b) for a, b in zip(w, one, strict=True)) for one in each) / n

    return {
        name: [llm_pruner_unit(unit, weights, whole, square, per_sequence, channel, matrices) for unit in units]
        for name, units in groups.items()
    }


def llm_pruner_unit(unit, weights, whole, square, per_sequence, channel, matrices):
    width = min(len(matrix[2]) for matrix in unit)
    by_matrix = []
    for matrix in unit:
        folded = [0.0] * width
        each = zip(*(vectors(g, matrix) for g in per_sequence), strict=True)
        rows = zip(vectors(weights, matrix), vectors(whole, matrix), vectors(square, matrix), each, strict=True)
        for c, row in enumerate(rows):
            folded[c % width] += channel(*row)
        by_matrix.append(folded)
    reduce = {
        "sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "prod": math.prod,
        "first": lambda v: v[0], "second": lambda v: v[1], "last": lambda v: v[-1],
    }[matrices]  # fmt: skip
    return sum(reduce(column) for column in zip(*by_matrix, strict=True))


def coupled(model, per_sequence, groups, *, drop=()):
    """SDMPrune: mean over k of sum_n abs(sum over matrices of w dw at (j, k)); ``drop`` leaves matrices out."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    scores = {}
    for name, units in groups.items():
        scores[name] = []
        for unit in units:
            total, hidden = 0.0, None
            for gradients in per_sequence:
                rows = []
                for matrix in unit:
                    if not matrix[0].endswith(tuple(drop)) or not drop:
                        (w,), (g,) = vectors(weights, matrix), vectors(gradients, matrix)
                        rows.append([a * b for a, b in zip(w, g, strict=True)])
                hidden = len(rows[0])
                total += sum(abs(sum(row[k] for row in rows)) for k in range(hidden))
            scores[name].append(total / hidden / len(per_sequence))
    return scores


def fisher(model, sequences, labels, consumers, *, per_token=True):
    """sum (a g)^2 / tokens with the gradient of -log p_label; consumers: name -> per unit (projection, channels)."""
    model.eval().requires_grad_(True)
    scores = {name: [0.0] * len(units) for name, units in consumers.items()}
    tokens = 0
    for ids, drawn in zip(sequences, labels, strict=True):
        seen = {}
        handles = []
        for units in consumers.values():
            module = model.get_submodule(units[0][0])

            def keep(module, args, key=units[0][0], seen=seen):
                args[0].retain_grad()
                seen[key] = args[0]

            handles.append(module.register_forward_pre_hook(keep))
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        (-sum(log_p[t, y] for t, y in enumerate(drawn))).backward()
        for handle in handles:
            handle.remove()
        tokens += len(ids)
        for name, units in consumers.items():
            for j, (key, channels) in enumerate(units):
                a, g = seen[key][0].tolist(), seen[key].grad[0].tolist()
                terms = [sum(a[t][c] * g[t][c] for c in channels) for t in range(len(ids))]
                scores[name][j] += sum(v * v for v in terms) if per_token else sum(terms) ** 2
    return {name: [v / tokens for v in found] for name, found in scores.items()}


def drawn_labels(model, ids, seed=0):
    """The labels of a sequence: splitmix64 in Python's integers, then the first entry where cumulated p passes."""
    mask, odd = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    tokens = [mix((int(i) * odd + t) & mask) for t, i in enumerate(ids, start=1)]
    sequence = mix((sum(tokens) + seed) & mask)
    with torch.no_grad():
        p = torch.softmax(model(input_ids=ids[None]).logits[0], -1).tolist()
    labels = []
    for t, row in enumerate(p, start=1):
        number = mix((sequence + t * odd) & mask) >> 16
        goal, passed, label = number / 2**48 * sum(row), 0.0, 0
        while passed + row[label] <= goal and label < len(row) - 1:
            passed, label = passed + row[label], label + 1
        labels.append(label)
    return labels
