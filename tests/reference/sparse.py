"""Scores of sparse methods weight by weight, and SparseGPT's update by constrained least squares. Float64 loops.

Shape legend: O outputs, C inputs, N tokens.
"""

import math

import torch


def wanda(weight, inputs):
    return [[abs(w) * math.sqrt(math.fsum(v * v for v in inputs[:, j].tolist())) for j, w in enumerate(row)]
            for row in weight.tolist()]  # fmt: skip


def ria(weight, inputs, power):
    rows = weight.tolist()
    by_row = [math.fsum(map(abs, row)) for row in rows]
    by_column = [math.fsum(abs(row[j]) for row in rows) for j in range(len(rows[0]))]
    norms = [math.sqrt(math.fsum(v * v for v in column)) for column in inputs.T.tolist()]
    return [[(abs(w) / by_column[j] + abs(w) / by_row[i]) * norms[j] ** power for j, w in enumerate(row)]
            for i, row in enumerate(rows)]  # fmt: skip


def z_pruner(weight, inputs):
    rows = weight.tolist()
    flat = [abs(w) for row in rows for w in row]
    mean = math.fsum(flat) / len(flat)
    sigma = sum(w < 0.1 * mean for w in flat) / len(flat)
    alpha = 0.7 * (1 - 0.3 * sigma)
    norm = lambda values: math.sqrt(math.fsum(v * v for v in values))  # noqa: E731
    columns = list(zip(*rows, strict=True))
    by_row = [[w / norm(row) for w in row] for row in rows]
    by_column = [[w / norm(columns[j]) for j, w in enumerate(row)] for row in rows]
    norms = [norm(column) for column in inputs.T.tolist()]

    def z(table):
        values = [v for row in table for v in row]
        middle = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))
        return [[(v - middle) / spread for v in row] for row in table]

    z_row, z_column = z(by_row), z(by_column)
    return [[(alpha * abs(z_row[i][j]) ** 3 + (1 - alpha) * abs(z_column[i][j]) ** 3) * norms[j] ** 1.5
             for j in range(len(row))] for i, row in enumerate(rows)]  # fmt: skip


def lowest(scores, count):
    """Indices of the ``count`` lowest of a list, the first of equal ones."""
    return set(sorted(range(len(scores)), key=lambda j: (scores[j], j))[:count])


def sequential_update(weight, hessian, mask):
    """Columns left to right: what is masked becomes zero, and the columns that follow minimise the quadratic loss anew.

    The loss of a row is (w - w0) H (w - w0)^T; columns already passed keep their values. Solved anew at every step.
    """
    new = weight.clone()
    columns = weight.shape[1]
    for i in range(len(weight)):
        for j in range(columns):
            if not mask[i, j]:
                continue
            before = new[i].clone()
            step = torch.zeros(columns, dtype=weight.dtype)
            step[j] = -before[j]
            rest = torch.arange(j + 1, columns)
            if len(rest):  # minimise step H step over the rest, step[j] given
                step[rest] = torch.linalg.solve(hessian[rest][:, rest], -hessian[rest, j] * step[j])
            new[i] = before + step
            new[i, j] = 0
    return new


def zeros_of_the_model(tables, count):
    """How many of the ``count`` lowest of all tables' scores lie in each; of equal ones the first table's go."""
    every = sorted((v, number) for number, table in enumerate(tables) for row in table for v in row)
    return [sum(number == wanted for _, number in every[:count]) for wanted in range(len(tables))]


def outlier_shares(layers, threshold):
    """Share of |w| ||x|| above ``threshold`` times the mean; a layer is a list of (weight, inputs)."""
    shares = []
    for layer in layers:
        values = [v for weight, inputs in layer for row in wanda(weight, inputs) for v in row]
        mean = math.fsum(values) / len(values)
        shares.append(sum(v > threshold * mean for v in values) / len(values))
    return shares


def retained(scores, groups, zeros):
    """The score that stays when each group of columns loses its ``zeros`` lowest in every row."""
    return math.fsum(
        math.fsum(sorted(row[j] for j in group)[zeros:]) for row in scores for group in groups
    )  # fmt: skip


def dealt(scores, of):
    """Columns by rising total, dealt to the slots of the groups: left to right, then right to left, and so on."""
    totals = [math.fsum(row[j] for row in scores) for j in range(len(scores[0]))]
    order = sorted(range(len(totals)), key=lambda j: (totals[j], j))
    count = len(order) // of
    groups = [[] for _ in range(count)]
    for place, column in enumerate(order):
        slot, position = divmod(place, count)
        groups[position if slot % 2 == 0 else count - 1 - position].append(column)
    return groups


def taylor(model, weights, sequences, loss):
    """Sum over sequences of |w * dw| by autograd with trainable weights; ``loss`` maps logits [T, V] and ids to a sum."""
    scores = [torch.zeros_like(weight) for weight in weights]
    for ids in sequences:
        for weight in weights:
            weight.requires_grad_(True)
        grads = torch.autograd.grad(loss(model(input_ids=ids[None]).logits[0], ids), weights)
        for score, weight, grad in zip(scores, weights, grads, strict=True):
            score += (weight.detach() * grad).abs()
    return scores
