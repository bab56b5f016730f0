"""LoRAPrune's importance by loops over weights, in float64."""


def importance(w, a, b, da, db, scaling):
    """|(dB A + B dA - dB dA) (W + s B A)| for every weight."""
    rank = len(a)
    rows = []
    for o in range(len(w)):
        row = []
        for c in range(len(w[0])):
            grad = sum(db[o][k] * a[k][c] + b[o][k] * da[k][c] - db[o][k] * da[k][c] for k in range(rank))
            whole = w[o][c] + scaling * sum(b[o][k] * a[k][c] for k in range(rank))
            row.append(abs(grad * whole))
        rows.append(row)
    return rows


def by_unit(matrices):
    """Sums of a unit's weights over each matrix, divided by the L2 norm over units; then over the matrices.

    ``matrices``: (importance, whether units own rows, for each unit its rows or columns).
    """
    units = len(matrices[0][2])
    total = [0.0] * units
    for s, rows, owned in matrices:
        sums = [
            sum(s[c][j] for c in channels for j in range(len(s[0]))) if rows
            else sum(s[i][c] for c in channels for i in range(len(s)))
            for channels in owned
        ]  # fmt: skip
        norm = sum(v * v for v in sums) ** 0.5
        total = [t + v / norm for t, v in zip(total, sums, strict=True)]
    return total
