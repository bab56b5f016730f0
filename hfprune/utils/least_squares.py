"""Least squares on second moments: refitted weights after inputs are removed, and the choice of those inputs.

For a projection y = W x with inputs x, kept inputs K and removed inputs R, the weights V on the kept inputs minimise

    sum_tokens || W x - V x_K ||^2  +  damping * || W_K - V ||^2

so V = W_K + W_R M_RK (M_KK + damping I)^-1, where M are the second moments of the inputs. Large damping leaves the kept
weights unchanged. All systems are solved in float64 from sums over tokens; activations are not stored.

Shape legend: O outputs, C inputs, K kept inputs, U units, w inputs of a unit.
"""

import torch
from torch import Tensor

from hfprune.utils.errors import CalibrationError
from hfprune.utils.second_moments import Moments


def ridge(moments: Moments, damping: float) -> float:
    """Returns the value added to the diagonal: ``damping`` times the mean second moment of an input.

    Args:
        moments: Second moments of the inputs.
        damping: Relative damping.

    Raises:
        CalibrationError: The moments are not finite.
    """
    mean = float(moments.xx.diagonal().mean())
    if not 0 <= mean < float("inf"):
        raise CalibrationError(f"The inputs' second moments are not finite (mean {mean}).")
    return damping * mean if mean else 1.0


def refit(weight: Tensor, moments: Moments, keep: Tensor, *, damping: float) -> Tensor:
    """Returns the least-squares weights on the kept inputs, [O, K], float64.

    With paired moments the target is W y, the projection's output for the second input (that of the dense model),
    instead of W x.

    Args:
        weight: W, [O, C].
        moments: Moments of the inputs; centred moments give the fit with a free intercept.
        keep: Kept inputs [K], int64, ascending.
        damping: Damping relative to the mean second moment.
    """
    w = weight.to(torch.float64)
    kept = w[:, keep]
    target = moments.xy if moments.paired else moments.xx
    matrix = moments.xx[keep][:, keep]
    extra = target[keep] @ w.T - matrix @ kept.T  # [K, O]: the part that the kept weights do not reproduce
    added = _damped(matrix, ridge(moments, damping))
    return kept + torch.cholesky_solve(extra, torch.linalg.cholesky(added)).T


def reconstruction_error(weight: Tensor, moments: Moments, new: Tensor, keep: Tensor) -> float:
    """Returns the relative error sum ||W x - V x_K||^2 / sum ||W x||^2, 0 for a perfect fit or outputs of zero.

    Args:
        weight: W, [O, C].
        moments: Moments of the inputs, not paired.
        new: V, [O, K].
        keep: Kept inputs [K], int64.
    """
    w = weight.to(torch.float64)
    difference = w.clone()
    difference[:, keep] -= new
    total = float(((w @ moments.xx) * w).sum())
    return float(((difference @ moments.xx) * difference).sum()) / total if total else 0.0


def eliminate(
    weight: Tensor, moments: Moments, width: int, *, unit_width: int, damping: float, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Removes units step by step, each time those with the smallest error after a refit of the others.

    This is Optimal Brain Surgeon (Hassibi and Stork, 1993) for whole units. With G the inverse of the damped moments of
    the remaining units and V the weights fitted to them, removing unit b costs trace(V_b (G_bb)^-1 V_b^T).

    Args:
        weight: W, [O, U * w]; unit j owns inputs j * w to (j + 1) * w - 1.
        moments: Moments of the inputs, not paired.
        width: Number of units to keep.
        unit_width: w.
        damping: Damping relative to the mean second moment.
        step: Units removed before the costs are recomputed; larger steps are faster and less accurate.

    Returns:
        The kept units, ascending, and the cost [U] of every unit: at its removal, or at the end for a kept unit.
    """
    inputs = weight.shape[1]
    units = inputs // unit_width
    v = weight.to(torch.float64).clone()
    factor = torch.linalg.cholesky(_damped(moments.xx, ridge(moments, damping)))
    inverse = torch.cholesky_inverse(factor)
    alive = torch.ones(units, dtype=torch.bool, device=weight.device)
    costs = torch.zeros(units, dtype=torch.float64, device=weight.device)
    while (left := int(alive.sum())) > width:
        costs = torch.where(alive, _costs(v, inverse, unit_width), costs)
        order = torch.sort(costs.masked_fill(~alive, torch.inf), stable=True).indices
        removed = order[: min(step, left - width)].sort().values
        alive[removed] = False
        channels = (removed[:, None] * unit_width + torch.arange(unit_width, device=removed.device)).flatten()
        rows = torch.linalg.solve(inverse[channels][:, channels], inverse[channels])
        v -= v[:, channels] @ rows
        inverse -= inverse[:, channels] @ rows
    costs = torch.where(alive, _costs(v, inverse, unit_width), costs)
    return alive.nonzero().squeeze(1), costs


def _costs(v: Tensor, inverse: Tensor, unit_width: int) -> Tensor:
    """Returns trace(V_b (G_bb)^-1 V_b^T) of every unit, [U]; NaN or infinite for removed units."""
    if unit_width == 1:
        return v.square().sum(0) / inverse.diagonal()
    units = len(inverse) // unit_width
    blocks = inverse.view(units, unit_width, units, unit_width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    by_unit = v.view(len(v), units, unit_width).permute(1, 2, 0)  # [U, w, O]
    identity = torch.eye(unit_width, dtype=blocks.dtype, device=blocks.device)
    removed = blocks.diagonal(dim1=1, dim2=2).abs().sum(1) <= 1e-12 * inverse.diagonal().abs().max()
    solved = torch.linalg.solve(torch.where(removed[:, None, None], identity, blocks), by_unit)
    costs: Tensor = (by_unit * solved).sum((1, 2))
    return costs


def _damped(matrix: Tensor, value: float) -> Tensor:
    return matrix + value * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
