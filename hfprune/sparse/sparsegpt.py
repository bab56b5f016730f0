"""SparseGPT: second-order pruning with a weight update (Frantar and Alistarh, 2023, arXiv:2301.00774)."""

from typing import ClassVar

import torch
from torch import Tensor

from hfprune.sparse.base import InputSums, Needs, Presets, Pruned, SparseMethod
from hfprune.sparse.pattern import Sparsity, drop
from hfprune.utils.errors import CalibrationError, ConfigError


class SparseGPT(SparseMethod):
    """Drops weights by w^2 / Hinv_jj^2 within blocks of columns and updates the following columns.

    Hinv is the upper Cholesky factor of the inverse of (2 / sequences) sum x x^T + damping * mean(diagonal) * I. Inputs
    that are always zero get weight zero and diagonal 1. The computation runs in float64; a matrix that is singular in
    spite of the damping raises ``CalibrationError``.

    Args:
        block: Number of columns per threshold and batch of updates.
        damping: Damping relative to the mean of the diagonal.

    Source: Frantar and Alistarh (2023, arXiv:2301.00774).

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> products = torch.eye(4, dtype=torch.float64) * 4 + 1
        >>> SparseGPT().prune(weight, InputSums(num_sequences=1, products=products), Sparsity.parse("2:4"))
        tensor([[0.0000, 0.0000, 2.8347, 3.8347],
                [8.0000, 0.0000, 0.0000, 7.1980]])
    """

    needs: ClassVar[Needs] = "products"
    presets: ClassVar[Presets] = {"sparsegpt": {}}

    def __init__(self, *, block: int = 128, damping: float = 0.01) -> None:
        if block < 1 or not damping >= 0:
            raise ConfigError(f"SparseGPT needs block >= 1 and damping >= 0; got {block} and {damping}.")
        self.block, self.damping = block, damping

    def apply(self, weight: Tensor, sums: InputSums, sparsity: Sparsity) -> Pruned:
        """Returns the updated weights with zeros."""
        sparsity.check(weight.shape[1], "the matrix")
        if sparsity.ratio == 0:
            return Pruned(weight=weight.clone(), dropped=torch.zeros_like(weight, dtype=torch.bool))
        return self._solve(weight, sums, sparsity, None)

    def update(self, weight: Tensor, sums: InputSums, mask: Tensor) -> Tensor:
        """Returns weights that are zero under ``mask`` [O, C]; the others are updated to compensate."""
        return self._solve(weight, sums, Sparsity(0.0), mask).weight

    def _solve(self, weight: Tensor, sums: InputSums, sparsity: Sparsity, mask: Tensor | None) -> Pruned:
        """Prunes the columns in order, by ``mask``, or by the scores of each block if it is None."""
        w = weight.to(torch.float64).clone()
        factor, dead = self.factor(sums)
        if mask is None:
            w[:, dead] = 0
        columns, step = w.shape[1], self.block
        if sparsity.of is not None:  # blocks contain whole groups
            step = -(-step // sparsity.of) * sparsity.of
        dropped = torch.zeros_like(w, dtype=torch.bool) if mask is None else mask
        for start in range(0, columns, step):
            end = min(start + step, columns)
            given = None if mask is None else mask[:, start:end]
            errors, dropped[:, start:end] = self._block(w, factor, start, end, sparsity, given)
            w[:, end:] -= errors @ factor[start:end, end:]
        return Pruned(weight=w.to(weight.dtype), dropped=dropped)

    def factor(self, sums: InputSums) -> tuple[Tensor, Tensor]:
        """Returns the upper Cholesky factor [C, C] of the inverse Hessian, and the mask [C] of always-zero inputs.

        Args:
            sums: Sums of the inputs, with ``products``.

        Raises:
            CalibrationError: The sums are not finite, or singular in spite of the damping.
        """
        assert sums.products is not None
        hessian = sums.products.to(torch.float64) * (2 / max(sums.num_sequences, 1))
        if not bool(hessian.isfinite().all()):
            raise CalibrationError("activations are not finite")
        diagonal = hessian.diagonal().clone()
        dead = diagonal == 0
        identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        hessian = hessian + torch.diag(dead.to(hessian.dtype))
        hessian = hessian + self.damping * hessian.diagonal().mean() * identity
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(failed):
            raise CalibrationError(
                f"the second moments of the inputs are singular with damping={self.damping:g}; increase it or "
                "calibrate on more tokens"
            )
        return upper, dead

    def _block(
        self, w: Tensor, factor: Tensor, start: int, end: int, sparsity: Sparsity, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prunes and updates columns ``start`` to ``end`` in place.

        Returns:
            The scaled errors and the mask of dropped weights, [O, end - start] each.
        """
        diagonal = factor.diagonal()
        errors = torch.zeros_like(w[:, start:end])
        if mask is None and sparsity.of is None:
            mask = drop((w[:, start:end] / diagonal[start:end]).square(), sparsity, scope="matrix")
        dropped = torch.zeros_like(errors, dtype=torch.bool) if mask is None else mask
        for j in range(start, end):
            if mask is None and sparsity.of is not None and j % sparsity.of == 0:
                last = j + sparsity.of
                scores = (w[:, j:last] / diagonal[j:last]).square()
                dropped[:, j - start : last - start] = drop(scores, sparsity, scope="row")
            kept = w[:, j].masked_fill(dropped[:, j - start], 0.0)
            error = (w[:, j] - kept) / diagonal[j]
            w[:, j:end] -= torch.outer(error, factor[j, j:end])
            w[:, j] = kept
            errors[:, j - start] = error
        return errors, dropped
