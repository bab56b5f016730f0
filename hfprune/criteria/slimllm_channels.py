"""SlimLLM scores of MLP channels: input norms, and contributions to the principal directions of the output."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune.criteria.activation_norm import squares
from hfprune.criteria.base import UNITS, Activation, ActivationCriterion, BatchInfo, LargeSums, Rows, Shape, Sums
from hfprune.criteria.channels import channels, slice_name, slice_names
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError

_OUTPUT, _OUTER = "output", "output products"


class SlimLLMChannels(ActivationCriterion):
    """I_g + I_u + I_d of an MLP neuron (SlimLLM; the code's form).

    With n_x[k] the norm of input channel k over all tokens and a_j the neuron's activation:

    - I_g(j) = norm(G_j * n_x), I_u(j) = norm(U_j * n_x) (only I_u for an MLP without gate);
    - I_d(j) = norm(a_j) norm(abs(D_:j^T Q) * sigmoid(lambda / mean(lambda))), with Q and lambda the eigenvectors and
      absolute eigenvalues of the centred, unnormalised covariance of the MLP's output.

    The published method scores a layer on the outputs of the pruned layers before it. This implementation scores all
    layers on the dense model, in one pass. It keeps an [H, H] float64 matrix per layer.

    Args:
        keep_lowest: Share of the neurons that are kept although they score lowest: the lowest ``round(share * I)``
            receive scores above all others. The published code has 0.01 (the paper does not mention it); the default 0
            turns this off.

    Raises:
        ConfigError: The share is not in [0, 1).

    Source: SlimLLM (Guo et al., 2025, arXiv:2505.22689).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> slices = (Slice(module="up_proj", side="out"), Slice(module="down_proj", side="in"))
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=slices)
        >>> x, a = torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
        >>> up, down = torch.eye(2), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
        >>> seen = [Activation(input=x, output=a), Activation(input=a, output=a @ down.T)]
        >>> score_batch(SlimLLMChannels(), group, seen, [up, down])
        tensor([5.3265, 3.9480], dtype=torch.float64)
    """

    name = "slimllm_channels"

    def __init__(self, *, keep_lowest: float = 0.0) -> None:
        if not 0 <= keep_lowest < 1:
            raise ConfigError(f"keep_lowest={keep_lowest} is not a share in [0, 1).")
        self.keep_lowest = keep_lowest

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` unless the units are neurons consumed by one projection."""
        if len(group.inputs()) != 1 or any(part.width != 1 for part in group.slices):
            raise ConfigError(
                f"SlimLLMChannels scores MLP neurons that one projection reads; {group.name} has units of kind "
                f"'{group.kind}'. Use SlimLLMHeads for attention heads."
            )

    def reads(self, part: Slice) -> bool:
        """Returns True: the criterion reads the inputs of producers, and the input and output of the consumer."""
        return True

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the numbers of input channels of every producer, of units, and of output channels."""
        named = zip(slice_names(group), group.slices, shapes, strict=True)
        sizes = {name: shape[1] for name, part, shape in named if part.side == "out"}
        return sizes | {UNITS: group.num_units, _OUTPUT: _output_size(group, shapes)}

    def moments(self, group: Group, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the outer products of the output."""
        size = _output_size(group, shapes)
        return {_OUTER: (size, size)}

    def rows(self, group: Group, part: Slice, seen: Activation, batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns sums of squares of inputs and units and sums of the output; adds the output's outer products."""
        found = squares(seen.input, batch)
        if part.side == "out":
            return {slice_name(group, part): found}
        output = batch.wide(seen.output, zero_padding=True)
        flat = output.flatten(0, 1)
        moments[_OUTER].add_((flat.T @ flat).to(moments[_OUTER]))
        return {UNITS: found[:, channels(group, part)], _OUTPUT: output.sum(dim=1).double()}

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns I_g + I_u + I_d, with the lowest scores lifted if ``keep_lowest`` is set."""
        total = torch.zeros_like(sums.rows[UNITS])
        for name, part, weight in zip(slice_names(group), group.slices, sums.weights(), strict=True):
            owned = weight.to(total)
            if part.side == "out":
                total += (owned[channels(group, part)] * sums.rows[name].sqrt()).norm(dim=1)
            else:
                directions = self._directions(sums)
                total += sums.rows[UNITS].sqrt() * (directions @ owned[:, channels(group, part)]).norm(dim=0)
        return self._lifted(total)

    def _directions(self, sums: Sums) -> Tensor:
        """Returns the eigenvectors of the output's covariance as rows, scaled by their weights, [H, H]."""
        mean = sums.rows[_OUTPUT] / sums.totals.num_tokens
        covariance = sums.moments[_OUTER] - sums.totals.num_tokens * torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        size = values.abs()
        directions: Tensor = vectors.T * torch.sigmoid(size / size.mean())[:, None]
        return directions

    def _lifted(self, score: Tensor) -> Tensor:
        count = round(self.keep_lowest * len(score))
        lowest = torch.sort(score, stable=True).indices[:count]
        return score.index_add(0, lowest, score.max().expand(count))

    def describe(self) -> dict[str, str]:
        """Returns name and settings for the plan's provenance."""
        return {"name": self.name, "keep_lowest": f"{self.keep_lowest:g}"}


def _output_size(group: Group, shapes: Sequence[Shape]) -> int:
    return next(shape[0] for part, shape in zip(group.slices, shapes, strict=True) if part.side == "in")
