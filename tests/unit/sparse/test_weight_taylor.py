"""Taylor scores of single weights against autograd with trainable weights."""

import pytest
import torch

from hfprune.models.groups import find_layers
from hfprune.models.projection import weight_of
from hfprune.sparse import Sparsity, TaylorSparsity
from hfprune.sparse.engine import prune_sparse
from hfprune.sparse.statistics import projections
from hfprune.sparse.weight_taylor import weight_taylor
from hfprune.utils.errors import CalibrationError
from tests.helpers.models import tiny
from tests.reference import sparse as reference
from tests.unit.pruning.test_layerwise import BATCHES

SEQUENCES = [row for batch in BATCHES for row in batch["input_ids"]]


def entropy(logits, ids):
    p = torch.softmax(logits, dim=-1)
    return -(p * p.log()).sum()


def cross_entropy(logits, ids):
    return -torch.log_softmax(logits[:-1], dim=-1)[torch.arange(len(ids) - 1), ids[1:]].sum()


@pytest.mark.parametrize(("name", "objective"), [("llama", "entropy"), ("gpt2", "cross_entropy"), ("opt", "entropy")])
def test_scores_equal_autograd(name, objective):
    model = tiny(name)
    found = weight_taylor(model, BATCHES, objective, range(3))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    modules = [(i, n, m) for i, layer in enumerate(find_layers(model)) for n, m in projections(layer).items()]
    loss = {"entropy": entropy, "cross_entropy": cross_entropy}[objective]
    expected = reference.taylor(model, [m.weight for _, _, m in modules], SEQUENCES, loss)
    for (layer, inside, module), scores in zip(modules, expected, strict=True):
        scores = scores if weight_of(module) is module.weight else scores.T
        torch.testing.assert_close(found[layer][inside].double(), scores, rtol=1e-5, atol=1e-7)


def test_layers_at_once_and_batches_do_not_matter():
    model = tiny(dtype=torch.float32)
    whole = weight_taylor(model, BATCHES, "entropy", range(3))
    rows = [{"input_ids": row[None]} for row in reversed(SEQUENCES)]
    for layer in range(3):
        part = weight_taylor(model, rows, "entropy", [layer])
        assert list(part) == [layer]
        assert all(torch.equal(part[layer][name], whole[layer][name]) for name in whole[layer])


@pytest.mark.parametrize("scope", ["row", "matrix", "model"])
def test_the_lowest_scores_become_zero(scope):
    model, dense = tiny(), tiny()
    scores = weight_taylor(dense, BATCHES, "cross_entropy", range(3))
    method = TaylorSparsity(objective="cross_entropy", scope=scope, layers_at_once=2)
    found = list(prune_sparse(model, BATCHES, method, Sparsity.parse(0.5)))
    gone = [(layer.index, name, weight_of(m) == 0) for layer, block in zip(found, find_layers(model), strict=True)
            for name, m in projections(block).items()]  # fmt: skip
    if scope == "row":
        assert all((mask.sum(1) == mask.shape[1] // 2).all() for _, _, mask in gone)
    if scope == "matrix":
        assert all(int(mask.sum()) == mask.numel() // 2 for _, _, mask in gone)
    if scope == "model":
        total = sum(mask.numel() for _, _, mask in gone)
        assert sum(int(mask.sum()) for _, _, mask in gone) == total // 2
        lowest = min(float(scores[i][n][~mask].min()) for i, n, mask in gone)
        assert max(float(scores[i][n][mask].max()) for i, n, mask in gone) <= lowest
    for index, name, mask in gone:
        if scope == "matrix":
            assert scores[index][name][mask].max() <= scores[index][name][~mask].min()


def test_scores_that_are_not_finite_are_named():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="of layer 0 are not finite"):
        weight_taylor(model, BATCHES, "entropy", range(3))
