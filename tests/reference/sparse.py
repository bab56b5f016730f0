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
