"""Exact sums: totals that do not depend on the order of their terms, on the number of ranks or on a resume.

Floating-point addition is not associative: the same terms added on two ranks, or in an interrupted run, give totals
that differ in the last bits, and two units of nearly equal score could change places. ``ExactSum`` rounds every term
to a fixed grid and adds integers instead.

Shape legend: U units, R rows (terms).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BITS = 42
_LIMBS = 4
LIMIT = 2.0**62
"""Terms must be smaller than this."""
GRID = 2.0 ** (-_BITS * (_LIMBS - 1))
"""Terms are truncated to multiples of this: 2^-126, the smallest normal float32."""
_CARRY_AFTER = 2**20  # an int64 holds the sum of 2^21 limbs of 42 bits: carry at half of that


class UnitSum(ABC):
    """Base class of sums per unit, with a state of plain tensors that can be added over ranks."""

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Adds the terms ``rows`` [R, U]."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the state. The elementwise sum of the states of all ranks is the state of all their terms."""

    @abstractmethod
    def load(self, tensors: tuple[Tensor, ...]) -> None:
        """Restores a state."""

    @abstractmethod
    def total(self) -> Tensor:
        """Returns the sum [U], float64."""


class ExactSum(UnitSum):
    """Fixed-point sum with 168 bits: the same bits for every order, grouping and number of processes.

    Each float64 term is truncated towards zero to the grid (2^-126), split into limbs of 42 bits, and added as int64.

    >>> s = ExactSum(2, device=torch.device("cpu"))
    >>> s.add(torch.tensor([[0.5, -1e-20], [0.25, 0.0]], dtype=torch.float64))
    >>> s.total()
    tensor([ 7.5000e-01, -1.0000e-20], dtype=torch.float64)
    """

    def __init__(self, num_units: int, *, device: torch.device) -> None:
        self._limbs = torch.zeros(_LIMBS, num_units, dtype=torch.int64, device=device)
        self._rows = 0

    def add(self, rows: Tensor) -> None:
        """Adds ``rows`` [R, U], float64, finite and smaller than ``LIMIT``."""
        rest = rows.to(torch.float64)
        for limb in self._limbs:
            part = rest.trunc()
            limb += part.to(torch.int64).sum(0)
            rest = rest.sub(part).mul_(2.0**_BITS)
        self._rows += len(rows)
        if self._rows >= _CARRY_AFTER:
            self._carry()

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the limbs, int64 [4, U]."""
        self._carry()
        return (self._limbs,)

    def load(self, tensors: tuple[Tensor, ...]) -> None:
        """Restores the limbs, int64 [4, U]."""
        (limbs,) = tensors
        self._limbs.copy_(limbs)
        self._carry()

    def total(self) -> Tensor:
        """Returns the sum [U], float64; equal limbs give equal bits."""
        self._carry()
        negative = self._limbs[0] < 0
        limbs = _carried(torch.where(negative, -self._limbs, self._limbs))
        total = torch.zeros_like(limbs[0], dtype=torch.float64)
        for limb in limbs.flip(0):
            total = total.mul_(2.0**-_BITS).add_(limb)
        return torch.where(negative, -total, total)

    def _carry(self) -> None:
        self._limbs, self._rows = _carried(self._limbs), 0


def _carried(limbs: Tensor) -> Tensor:
    """Returns the same number with every limb but the first in [0, 2^42)."""
    limbs = limbs.clone()
    for k in range(_LIMBS - 1, 0, -1):
        carry = limbs[k] >> _BITS
        limbs[k] -= carry << _BITS
        limbs[k - 1] += carry
    return limbs


class Bfloat16Sum(UnitSum):
    """Running bfloat16 sum of the published HFPrune code, with the same rounding errors."""

    def __init__(self, num_units: int, *, device: torch.device) -> None:
        self._sum = torch.zeros(num_units, dtype=torch.bfloat16, device=device)

    def add(self, rows: Tensor) -> None:
        """Adds the rows of [R, U] one after another, rounding after each."""
        for row in rows.to(torch.bfloat16):
            self._sum += row

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the sum, bfloat16 [U]."""
        return (self._sum,)

    def load(self, tensors: tuple[Tensor, ...]) -> None:
        """Restores a sum, bfloat16 [U]."""
        self._sum.copy_(tensors[0])

    def total(self) -> Tensor:
        """Returns the sum [U], float64."""
        return self._sum.to(torch.float64)


class GridSum:
    """Sum of tensors of one shape, with the same bits for every order, grouping and number of processes.

    Each float64 term is split into a multiple of 2^-10 and a remainder rounded to 2^-52. Both parts are added in
    float64, which is exact for totals below 2^43; larger or non-finite totals are rounded as usual. The sum takes twice
    the memory of a plain one; ``ExactSum`` would take four times.

    Args:
        shape: Shape of the terms.
        device: Device of the sum.

    >>> s = GridSum((2,), device=torch.device("cpu"))
    >>> s.add(torch.tensor([1e9, -0.5])), s.add(torch.tensor([2.0**-40, 0.25]))
    (None, None)
    >>> s.total().tolist() == [1e9 + 2.0**-40, -0.25]
    True
    """

    _COARSE, _FINE = 2.0**10, 2.0**52
    _CARRY_AFTER = 1024  # rests of at most 2^-11 each

    def __init__(self, shape: Sequence[int], *, device: torch.device) -> None:
        self._high = torch.zeros(*shape, dtype=torch.float64, device=device)
        self._low = torch.zeros_like(self._high)
        self._terms = 0

    def add(self, term: Tensor) -> None:
        """Adds a term of the sum's shape."""
        term = term.to(torch.float64)
        high = (term * self._COARSE).round_().div_(self._COARSE)
        self._high += high
        self._low += high.sub_(term).mul_(-self._FINE).round_().div_(self._FINE)
        self._terms += 1
        if self._terms % self._CARRY_AFTER == 0:
            self._carry()

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the total over all ranks, float64, of the sum's shape.

        Args:
            reduce: Function that sums a tensor over the ranks.
        """
        self._carry()
        self._high, self._low = reduce(self._high), reduce(self._low)
        self._carry()
        return self._high + self._low

    def total(self) -> Tensor:
        """Returns the total, float64, of the sum's shape; equal terms give equal bits."""
        return self.reduced(lambda tensor: tensor)

    def _carry(self) -> None:
        whole = (self._low * self._COARSE).round_().div_(self._COARSE)
        self._high, self._low = self._high + whole, self._low - whole
