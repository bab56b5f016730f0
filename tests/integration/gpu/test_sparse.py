"""Every sparse method makes the same weights zero on CUDA as on the CPU, offloaded or not."""

import pytest
import torch

from hfprune.models.groups import find_layers
from hfprune.models.projection import weight_of
from hfprune.sparse import OutlierWeighed, SparseGPT, Sparsity, TaylorSparsity, Wanda
from hfprune.sparse.engine import prune_sparse
from hfprune.sparse.names import METHODS
from hfprune.sparse.state import LayerState
from hfprune.sparse.statistics import projections
from tests.helpers.models import tiny
from tests.integration.gpu import test_criteria as test_cuda
from tests.integration.gpu.test_criteria import BATCHES, DEVICE, WIDE, check

pytestmark = test_cuda.pytestmark

SPARSE = {name: make for name, make in METHODS.items() if not name.endswith("_model")}
ACROSS = {name: make for name, make in METHODS.items() if name.endswith("_model")} | {
    "taylor_model": lambda: TaylorSparsity(scope="model", layers_at_once=2)
}


def masks(model, method, sparsity, **options):
    rows = [{"input_ids": row[None]} for batch in BATCHES for row in batch["input_ids"]]
    with torch.no_grad():
        found = list(prune_sparse(model, rows, method, sparsity, **options))
    named = {
        f"{i}.{n}": weight_of(m) for i, layer in enumerate(find_layers(model)) for n, m in projections(layer).items()
    }
    return {key: weight.detach().cpu() for key, weight in named.items()}, found


def same_zeros(here, there, tol):
    assert all(torch.equal(there[key] == 0, weight == 0) for key, weight in here.items())
    check(there, here, tol)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("name", WIDE)
def test_every_sparse_method_makes_the_same_zeros(name, method, sparsity):
    sparsity = Sparsity.parse(sparsity)
    here, _ = masks(tiny(name), SPARSE[method](), sparsity)
    for offload in (None, "cpu"):
        model = tiny(name).to(DEVICE if offload is None else "cpu")  # offloaded, layers visit the device one by one
        there, layers = masks(model, SPARSE[method](), sparsity, device=torch.device(DEVICE), offload=offload)
        same_zeros(here, there, 1e-7)  # SparseGPT solves with a badly conditioned matrix
        assert all(0 < layer.error < 2 for layer in layers)


@pytest.mark.parametrize("method", ACROSS)
def test_one_ranking_over_all_matrices(method):
    here, _ = masks(tiny("gpt2"), ACROSS[method](), Sparsity.parse(0.5))
    for offload in (None, "cpu"):
        model = tiny("gpt2").to(DEVICE if offload is None else "cpu")
        there, _ = masks(model, ACROSS[method](), Sparsity.parse(0.5), device=torch.device(DEVICE), offload=offload)
        same_zeros(here, there, 1e-9)


def test_sparse_with_update_outliers_files_and_a_resume(tmp_path):
    settings = {"update": SparseGPT(damping=0.1), "allocation": OutlierWeighed(threshold=2.0)}
    half, device = Sparsity.parse(0.5), torch.device(DEVICE)
    here, _ = masks(tiny("gpt2"), Wanda(), half, **settings)
    for resumed in (False, True):
        state = LayerState(tmp_path, {}, fresh=not resumed, writer=True, broadcast=lambda found: found)
        there, layers = masks(
            tiny("gpt2").to(DEVICE), Wanda(), half, offload="disk", state=state, device=device, **settings
        )
        assert [layer.resumed for layer in layers] == [resumed] * 3
        same_zeros(here, there, 1e-7)
