"""How zeros are spread over matrices."""

import pytest
import torch

from hfprune.sparse import (
    METHODS,
    ExplicitSparsity,
    MagnitudeSparsity,
    Matrix,
    OutlierWeighed,
    Sparsity,
    TaylorSparsity,
    UniformSparsity,
    Wanda,
    drop,
    sparse_method,
    zeros_across,
)
from hfprune.utils.errors import ConfigError
from tests.reference import sparse as reference

HALF = Sparsity.parse(0.5)
MATRICES = [Matrix(layer=layer, name=name, shape=shape)
            for layer in range(3) for name, shape in (("attn.q", (8, 8)), ("mlp.down", (8, 20 + 4 * layer)))]  # fmt: skip


def test_owl_is_the_papers_formula():
    outliers = [0.02, 0.05, 0.03]
    found = OutlierWeighed(spread=0.1).spread(MATRICES, HALF, outliers)
    raw = [(o - 0.02) / 0.03 * 2 * 0.1 for o in outliers]
    sizes = [8 * 8 + 8 * (20 + 4 * layer) for layer in range(3)]
    mean = sum(r * s for r, s in zip(raw, sizes, strict=True)) / sum(sizes)
    for matrix in MATRICES:
        assert found[matrix.path].ratio == pytest.approx(0.5 + mean - raw[matrix.layer])
    total = sum(found[m.path].ratio * m.size for m in MATRICES)
    assert total == pytest.approx(0.5 * sum(sizes))
    assert found["1.attn.q"].ratio < found["2.attn.q"].ratio < found["0.attn.q"].ratio  # most outliers, fewest zeros


def test_owl_without_differences_is_uniform():
    found = OutlierWeighed().spread(MATRICES, HALF, [0.1, 0.1, 0.1])
    assert found == UniformSparsity().spread(MATRICES, HALF, None)


def test_what_owl_refuses():
    with pytest.raises(ConfigError, match="fixes the zeros of every group"):
        OutlierWeighed().spread(MATRICES, Sparsity.parse("2:4"), [0, 0, 1])
    with pytest.raises(ConfigError, match="Use a smaller spread"):
        OutlierWeighed(spread=0.9).spread(MATRICES, HALF, [0, 0, 1])
    with pytest.raises(ConfigError, match="threshold > 0"):
        OutlierWeighed(threshold=0)


def test_explicit_the_last_pattern_counts():
    found = ExplicitSparsity({"*.q": 0.3, "1.*": "2:4", "2.mlp.down": 0}).spread(MATRICES, HALF, None)
    assert {path: str(value) for path, value in found.items()} == {
        "0.attn.q": "0.3", "0.mlp.down": "0.5", "1.attn.q": "2:4", "1.mlp.down": "2:4", "2.attn.q": "0.3",
        "2.mlp.down": "0",
    }  # fmt: skip


def test_explicit_refuses_what_fits_nothing():
    with pytest.raises(ConfigError, match=r"'\*.k' matches no projection. Names of projections are '0.attn.q'"):
        ExplicitSparsity({"*.k": 0.3}).spread(MATRICES, HALF, None)
    with pytest.raises(ConfigError, match="not in"):
        ExplicitSparsity({"*.q": 1.2})


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.93])
def test_one_ranking_over_all_matrices(ratio):
    generator = torch.Generator().manual_seed(0)
    tables = {name: (torch.rand(7, 9, generator=generator) * scale * 8).round() / 8
              for name, scale in (("a", 1.0), ("b", 3.0), ("c", 0.2))}  # fmt: skip
    found = zeros_across(lambda: iter(tables.items()), Sparsity(ratio))
    counts = [int(drop(tables[n], found[n], scope="matrix").sum()) for n in tables]
    assert counts == reference.zeros_of_the_model([t.tolist() for t in tables.values()], int(189 * ratio))
    assert sum(counts) == int(189 * ratio)


def test_names():
    assert isinstance(sparse_method("wanda"), Wanda)
    for name in METHODS:
        assert sparse_method(name).describe()["name"]
    with pytest.raises(ConfigError, match="Unknown method 'wnada'. Did you mean 'wanda'"):
        sparse_method("wnada")
    for method in (MagnitudeSparsity, TaylorSparsity):
        assert method(scope="model").across
        assert not method(scope="matrix").across
        with pytest.raises(ConfigError, match="choose one of row, matrix, model"):
            method(scope="layer")
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        TaylorSparsity(objective="entropi")
