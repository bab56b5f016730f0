"""First and second moments of a projection's inputs, summed over tokens.

Shape legend: N tokens, C input channels, K kept channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Weighted sums over tokens of x, x x^T and, with a second input y of equal shape, x y^T, in float64.

    Products of one batch are formed in the dtype of the inputs, float32 at least, and added in float64. All of them are
    plain sums: batches and ranks add up.

    Attributes:
        count: Sum of the tokens' weights: their number, where all weigh the same.
        x: [C], sum of x.
        xx: [C, C], sum of x x^T.
        y: [C], sum of y; zeros where there is none.
        xy: [C, C], sum of x y^T; empty where there is none.

    Args:
        channels: C.
        device: Where the sums live.
        paired: Whether there is a y.
    """

    def __init__(self, channels: int, *, device: torch.device, paired: bool = False) -> None:
        self.paired = paired
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.x, self.y = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2))
        self.xx = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.xy = torch.zeros_like(self.xx) if paired else self.xx.new_zeros(0, 0)

    def add(self, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds the tokens of ``x`` [..., C], and of ``y`` of the same shape, each counted ``weights`` [...] times."""
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
        """Takes over sums that ``tensors`` returned, here or on all ranks together."""
        self.count, self.x, self.xx, self.y, self.xy = tensors

    def mean(self, keep: Tensor) -> Tensor:
        """Returns the mean of x over tokens at inputs ``keep``, [K]."""
        return self.x[keep] / self.count

    def centred(self) -> "Moments":
        """Returns the moments of x and y about their means (sums of squares and products, not divided)."""
        out = object.__new__(Moments)
        out.paired, out.count = self.paired, self.count
        out.x, out.y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        out.xx = self.xx - torch.outer(self.x, self.x) / self.count
        out.xy = self.xy - torch.outer(self.x, self.y) / self.count if self.paired else self.xy
        return out


def wide_tokens(values: Tensor) -> Tensor:
    """Returns [..., C] as [N, C], float32 or wider."""
    return values.reshape(-1, values.shape[-1]).to(torch.promote_types(values.dtype, torch.float32))
