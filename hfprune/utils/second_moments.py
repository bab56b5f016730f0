"""First and second moments of a projection's inputs, summed over tokens.

Shape legend: N tokens, C input channels, K kept channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Weighted sums over tokens of x, x x^T and, with a second input y of equal shape, x y^T, in float64.

    Products within a batch are computed in the dtype of the inputs, float32 at least, and accumulated in float64. The
    sums of batches and ranks can be added.

    Attributes:
        count: Sum of the token weights; the number of tokens without weights.
        x: Sum of x, [C].
        xx: Sum of x x^T, [C, C].
        y: Sum of y, [C]; zeros without y.
        xy: Sum of x y^T, [C, C]; empty without y.

    Args:
        channels: C.
        device: Device of the sums.
        paired: Whether there is a second input y.
    """

    def __init__(self, channels: int, *, device: torch.device, paired: bool = False) -> None:
        self.paired = paired
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.x, self.y = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2))
        self.xx = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.xy = torch.zeros_like(self.xx) if paired else self.xx.new_zeros(0, 0)

    def add(self, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds the tokens of ``x`` and ``y``, both [..., C], with the token weights ``weights`` [...]."""
        assert (y is not None) == self.paired
        x = wide_tokens(x)
        weighted = x if weights is None else x * weights.reshape(-1, 1).to(x.dtype)
        self.count += len(x) if weights is None else weights.sum(dtype=torch.float64)
        self.x += weighted.sum(0, dtype=torch.float64)
        self.xx += weighted.T @ x
        if y is not None:
            y = wide_tokens(y)
            self.y += (y if weights is None else y * weights.reshape(-1, 1).to(y.dtype)).sum(0, dtype=torch.float64)
            self.xy += weighted.T @ y

    def tensors(self) -> list[Tensor]:
        """Returns every sum."""
        return [self.count, self.x, self.xx, self.y, self.xy]

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Restores sums that ``tensors`` returned, possibly added over ranks."""
        self.count, self.x, self.xx, self.y, self.xy = tensors

    def mean(self, keep: Tensor) -> Tensor:
        """Returns the mean over tokens of the inputs ``keep`` [K], of shape [K]."""
        return self.x[keep] / self.count

    def centred(self) -> "Moments":
        """Returns the central moments of x and y, as sums that are not divided by the count."""
        out = object.__new__(Moments)
        out.paired, out.count = self.paired, self.count
        out.x, out.y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        out.xx = self.xx - torch.outer(self.x, self.x) / self.count
        out.xy = self.xy - torch.outer(self.x, self.y) / self.count if self.paired else self.xy
        return out


def wide_tokens(values: Tensor) -> Tensor:
    """Returns ``values`` [..., C] as [N, C], in float32 or a wider dtype."""
    return values.reshape(-1, values.shape[-1]).to(torch.promote_types(values.dtype, torch.float32))
