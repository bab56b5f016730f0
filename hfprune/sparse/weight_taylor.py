"""First-order Taylor scores of single weights, |w dL/dw|, and the calibration pass that computes them.

Shape legend: T tokens, O outputs and C inputs of a projection.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from hfprune.models.contexts import frozen, hooked
from hfprune.models.forward import objective_sum, sequences
from hfprune.models.groups import find_layers
from hfprune.models.layer_stream import Reduce
from hfprune.models.projection import weight_of
from hfprune.objectives import OBJECTIVES
from hfprune.sparse.allocation import Matrix
from hfprune.sparse.base import InputSums, Needs, Presets, ScoreMethod, SparseMethod
from hfprune.sparse.pattern import WideScope, check_scope
from hfprune.sparse.state import LayerState
from hfprune.sparse.statistics import projections
from hfprune.utils.errors import CalibrationError
from hfprune.utils.exact_sums import GridSum
from hfprune.utils.second_moments import wide_tokens


class TaylorSparsity(ScoreMethod):
    """Sum over sequences of |w_ij * d objective / d w_ij| on the dense model.

    This is the elementwise form of LLM-Pruner's ``param_first`` at batch size 1, for any objective. The gradient of a
    sequence is summed over its tokens before the absolute value is taken.

    Args:
        objective: Objective to differentiate, ``entropy`` or ``cross_entropy``.
        scope: Weights that are ranked together; scores are comparable between matrices, so ``model`` is allowed.
        layers_at_once: Number of layers scored in one pass over the data, at 16 bytes per weight; None for all.

    Source: LLM-Pruner (Ma et al., 2023, arXiv:2305.11627).

    Example:
        >>> from hfprune.sparse.pattern import Sparsity
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 6.0, -5.0, 7.0]])
        >>> sums = InputSums(importance=weight.abs())
        >>> TaylorSparsity().prune(weight, sums, Sparsity(0.5))
        tensor([[0., 0., 3., 4.],
                [8., 0., 0., 7.]])
    """

    needs: ClassVar[Needs] = "importance"
    presets: ClassVar[Presets] = {"taylor": {}, "taylor_cross_entropy": {"objective": "cross_entropy"}}

    def __init__(
        self, *, objective: str = "entropy", scope: WideScope = "row", layers_at_once: int | None = None
    ) -> None:
        OBJECTIVES.get(objective)
        check_scope(scope, get_args(WideScope))
        self.objective, self.layers_at_once, self.scope = objective, layers_at_once, scope

    def score(self, weight: Tensor, sums: InputSums) -> Tensor:
        """Returns the precomputed scores."""
        assert sums.importance is not None
        return sums.importance


class ImportanceSource:
    """Gradient scores of the dense model, computed before the first layer is pruned.

    Args:
        model: The dense model, in eval mode.
        batches: ``input_ids`` [B, T] of this rank, without padding.
        method: The method; only :class:`TaylorSparsity` needs gradient scores.
        state: Folder in which scores are saved, also those of an earlier run; None keeps them in memory.
        reduce: Function that adds a tensor up over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        method: SparseMethod,
        state: LayerState | None,
        reduce: Reduce,
    ) -> None:
        self._model, self._batches, self._method, self._state, self._reduce = model, batches, method, state, reduce
        self._found: dict[int, dict[str, Tensor]] = {}

    def prepare(self, device: torch.device) -> None:
        """Computes the scores by forward and backward passes of the whole model.

        Args:
            device: Device of the passes; the model is moved there and back.

        Raises:
            CalibrationError: There is no token, or a score is not finite.
        """
        if not isinstance(self._method, TaylorSparsity):
            return
        layers = list(range(len(find_layers(self._model))))
        step = self._method.layers_at_once or len(layers)
        for part in (layers[start : start + step] for start in range(0, len(layers), step)):
            if self._state is not None and self._state.load(_name(part[-1])) is not None:
                continue  # saved by an earlier run
            home = next(self._model.parameters()).device
            self._model.to(device)
            found = weight_taylor(self._model, self._batches, self._method.objective, part, reduce=self._reduce)
            self._model.to(home)
            for layer, scores in found.items():
                if self._state is None:
                    self._found[layer] = scores
                else:
                    self._state.save(_name(layer), scores, None)

    def of(self, layer: int, name: str) -> Tensor | None:
        """Returns the scores [O, C] of one projection; None if the method needs none."""
        if not isinstance(self._method, TaylorSparsity):
            return None
        if layer not in self._found:
            assert self._state is not None
            saved = self._state.load(_name(layer))
            assert saved is not None
            self._found = {layer: saved[0]}  # one layer in memory at a time
        return self._found[layer][name]

    def scores(self, matrices: Sequence[Matrix]) -> Iterator[tuple[str, Tensor]]:
        """Yields path and scores [O, C] of each matrix, for methods that need no statistics of the inputs."""
        assert isinstance(self._method, ScoreMethod)
        layers = find_layers(self._model)
        for matrix in matrices:
            weight = weight_of(layers[matrix.layer].get_submodule(matrix.name)).detach()
            sums = InputSums(importance=self.of(matrix.layer, matrix.name))
            try:
                yield matrix.path, self._method.ranked(weight, sums)
            except CalibrationError as error:
                raise CalibrationError(f"{matrix.path}: {error}.") from error


def weight_taylor(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    objective: str,
    layers: Sequence[int],
    *,
    reduce: Reduce | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Computes the sum over sequences of |w * d objective / d w| for every projection of some layers.

    Weights are frozen: the gradient of a projection for a sequence is the product of output gradient and input, summed
    over tokens. The autograd graph begins at the first of ``layers``.

    Args:
        model: A supported Hugging Face causal LM.
        batches: ``input_ids`` [B, T] of this rank; every sequence runs alone.
        objective: Name of the objective, summed over tokens.
        layers: Indices of the layers.
        reduce: Function that adds a tensor up over ranks; None for a single process.

    Returns:
        Layer -> name of the projection -> scores [O, C], float32.

    Raises:
        CalibrationError: A score is not finite.
    """
    sums: dict[tuple[int, str], GridSum] = {}
    found = {(index, name): m for index in layers for name, m in projections(find_layers(model)[index]).items()}
    for key, module in found.items():
        weight = weight_of(module)
        sums[key] = GridSum(weight.shape, device=weight.device)
    handles = [module.register_forward_hook(_hook(sums[key])) for key, module in found.items()]
    device = next(model.parameters()).device
    with frozen(model), hooked(handles), torch.enable_grad():
        for sequence in (sequence for batch in batches for sequence in sequences(batch)):
            moved = {name: value.to(device) for name, value in sequence.items()}
            total, _ = objective_sum(model, OBJECTIVES.get(objective), moved)
            total.backward()
    result: dict[int, dict[str, Tensor]] = {}
    for (index, name), summed in sums.items():
        scores = summed.reduced(reduce or (lambda tensor: tensor)).to(torch.float32)
        if not bool(scores.isfinite().all()):
            raise CalibrationError(f"The scores of {name} of layer {index} are not finite. Calibrate in float32.")
        result.setdefault(index, {})[name] = scores
    return result


def _hook(total: GridSum) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        y = output if output.requires_grad else output.detach().requires_grad_()
        x, weight = args[0].detach(), weight_of(module)

        def add(grad: Tensor) -> None:
            total.add((wide_tokens(grad).T @ wide_tokens(x) * weight).abs())

        y.register_hook(add)
        return y

    return hook


def _name(layer: int) -> str:
    return f"importance-{layer:05}"
