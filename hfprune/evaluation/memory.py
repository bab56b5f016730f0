"""How much memory a computation takes beside a model's weights."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfprune.arch import parameter_count


def peak_bytes(model: Any, run: Callable[[], object]) -> int:
    """Returns the bytes of the weights, tied ones once, and of the most that ``run`` keeps alive beside them at once.

    On CUDA the allocator's own figure; elsewhere the tensors that operators return are counted, without what kernels
    allocate within.
    """
    weights = parameter_count(model) * int(next(model.parameters()).element_size())
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return weights + int(torch.cuda.max_memory_allocated(device)) - int(before)
    with _LiveTensors(model) as live:
        run()
    return weights + int(live.peak)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of every storage that operators make, until it is freed."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [*model.parameters(), *model.buffers()]
        self._known = {t.untyped_storage()._cdata for t in tensors}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it returns."""
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
