"""Least squares from whole matrices of activations, by torch.linalg.lstsq; removal by trying every unit.

Shape legend: N tokens, C inputs, O outputs, K kept inputs.
"""

import torch


def fit(weight, inputs, targets, keep, ridge):
    """V that minimises ||targets - V x_K||^2 + ridge ||V - W_K||^2, from rows instead of moments."""
    kept = inputs[:, keep]
    rows = torch.cat([kept, ridge**0.5 * torch.eye(len(keep), dtype=inputs.dtype)])
    aims = torch.cat([targets, ridge**0.5 * weight[:, keep].T])
    return torch.linalg.lstsq(rows, aims).solution.T


def fit_with_intercept(weight, inputs, targets, keep, ridge):
    """The same with a free constant per output, which the ridge leaves alone; returns V and the constants."""
    kept = torch.cat([inputs[:, keep], torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    penalty = ridge**0.5 * torch.eye(len(keep) + 1, dtype=inputs.dtype)[:-1]
    solution = torch.linalg.lstsq(
        torch.cat([kept, penalty]), torch.cat([targets, ridge**0.5 * weight[:, keep].T])
    ).solution
    return solution[:-1].T, solution[-1]


def loss(weight, inputs, units, unit_width, ridge):
    """The least ||W x - V x_S||^2 + ridge ||W - V||^2 over V that are zero outside the channels of ``units``."""
    channels = [unit * unit_width + k for unit in units for k in range(unit_width)]
    new = torch.zeros_like(weight)
    new[:, channels] = fit(weight, inputs, inputs @ weight.T, channels, ridge)
    return float((inputs @ (weight - new).T).square().sum() + ridge * (weight - new).square().sum())


def greedy(weight, inputs, width, unit_width, ridge):
    """Removes units one at a time, each time the one whose removal leaves the least loss."""
    units = list(range(weight.shape[1] // unit_width))
    while len(units) > width:
        losses = [loss(weight, inputs, [u for u in units if u != unit], unit_width, ridge) for unit in units]
        units.remove(units[losses.index(min(losses))])
    return units


def output_regression(weight, inputs, targets, keep, *, intercept):
    """One line per output through (kept output, target), by lstsq; returns factors and constants."""
    factors, constants = [], []
    for row, aim in zip(weight[:, keep], targets.T, strict=True):
        output = inputs[:, keep] @ row
        columns = [output, torch.ones_like(output)] if intercept else [output]
        solution = torch.linalg.lstsq(torch.stack(columns, dim=1), aim[:, None]).solution.flatten()
        factors.append(solution[0])
        constants.append(solution[1] if intercept else torch.zeros((), dtype=weight.dtype))
    return torch.stack(factors), torch.stack(constants)
