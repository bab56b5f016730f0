"""The pass of sparse methods: updates, allocations, offloading, resuming, ranks, and what was saved."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfprune.callbacks.sparse import sparsity_summary
from hfprune.models.groups import find_layers
from hfprune.models.projection import weight_of
from hfprune.plan import PruningPlan
from hfprune.sparse import (
    RIA,
    ExplicitSparsity,
    MagnitudeSparsity,
    OutlierWeighed,
    SparseGPT,
    Sparsity,
    TaylorSparsity,
    Wanda,
    ZPruner,
)
from hfprune.sparse.engine import SparsePass, matrices_of, prune_sparse
from hfprune.sparse.state import LayerState, count_saved, load_orders, save_orders
from hfprune.sparse.statistics import projections
from hfprune.utils.errors import ConfigError, OutputError
from tests.helpers.models import NAMES, tiny, token_ids
from tests.reference import sparse as reference
from tests.unit.pruning.test_layerwise import BATCHES, CPU, inputs_of

HALF, TWO_FOUR = Sparsity.parse(0.5), Sparsity.parse("2:4")
ROWS = [{"input_ids": row[None]} for batch in BATCHES for row in batch["input_ids"]]


def pruned(method=None, sparsity=HALF, *, batches=ROWS, model=None, **kwargs):
    model = model or tiny(dtype=torch.float32)
    return model, list(prune_sparse(model, batches, method or Wanda(), sparsity, **kwargs))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_holds_a_pattern_with_permutation_and_update(name):
    model, found = pruned(
        RIA(permutation="assigned"), TWO_FOUR, model=tiny(name, dtype=torch.float32), batches=ROWS[:2],
        update=SparseGPT(damping=0.1),
    )  # fmt: skip
    for layer, block in zip(found, find_layers(model), strict=True):
        for inside, module in projections(block).items():
            zeros = (weight_of(module) == 0)[:, layer.orders[inside]].unflatten(1, (-1, 4)).sum(-1)
            assert (zeros == 2).all()
            assert layer.matrices[inside].permuted


def test_the_update_is_constrained_least_squares_on_the_pruned_prefix():
    model, dense = tiny(), tiny()
    pruned(Wanda(), HALF, batches=BATCHES, model=model, update=SparseGPT(block=8))
    name = "model.layers.1.mlp.down_proj"
    prefix = tiny()
    for old, new in list(zip(find_layers(prefix), find_layers(model), strict=True))[:1]:
        old.load_state_dict(new.state_dict())
    x = inputs_of(prefix, name)
    hessian = x.T @ x * 2 / 5
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    weight, new = dense.get_submodule(name).weight.detach(), model.get_submodule(name).weight.detach()
    expected = reference.sequential_update(weight, hessian, new == 0)
    torch.testing.assert_close(new, expected, atol=1e-8, rtol=1e-8)


def test_the_update_lowers_the_error_and_keeps_the_mask_of_the_first_layer():
    plain, before = pruned(MagnitudeSparsity())
    model, after = pruned(MagnitudeSparsity(), update=SparseGPT())
    assert after[0].error < before[0].error
    for a, b in zip(*(projections(find_layers(m)[0]).values() for m in (plain, model)), strict=True):
        assert torch.equal(a.weight == 0, b.weight == 0)


def test_what_excludes_each_other():
    with pytest.raises(ConfigError, match="SparseGPT updates the weights itself"):
        pruned(SparseGPT(), update=SparseGPT())
    with pytest.raises(ConfigError, match="ranks the weights of all matrices together, but sparsity=2:4"):
        pruned(MagnitudeSparsity(scope="model"), TWO_FOUR)
    with pytest.raises(ConfigError, match="together, but OutlierWeighed sets"):
        pruned(TaylorSparsity(scope="model"), allocation=OutlierWeighed())
    with pytest.raises(ConfigError, match="mlp.down_proj of layer 2 has 24 inputs, not a multiple of 5"):
        pruned(allocation=ExplicitSparsity({"2.mlp.down_proj": "2:5"}))


def test_outliers_are_counted_on_the_dense_model():
    model = tiny()
    work = SparsePass(model, BATCHES, Wanda(), HALF, allocation=OutlierWeighed(threshold=2.0))
    found = work._outliers(work._stream(CPU, None, None), 2.0)
    layers = [
        [(m.weight.detach(), inputs_of(model, f"model.layers.{i}.{n}")) for n, m in projections(layer).items()]
        for i, layer in enumerate(find_layers(model))
    ]
    assert found == pytest.approx(reference.outlier_shares(layers, 2.0), abs=1e-12)
    _, result = pruned(Wanda(scope="matrix"), allocation=OutlierWeighed(threshold=2.0, spread=0.2))
    shares = [sum(m.zeros for m in layer.matrices.values()) for layer in result]
    assert len(set(shares)) == 3
    assert sum(shares) / sum(m.weights for layer in result for m in layer.matrices.values()) == pytest.approx(
        0.5, abs=5e-3
    )


def test_explicit_shares_and_one_ranking():
    _, found = pruned(MagnitudeSparsity(), allocation=ExplicitSparsity({"0.*": 0, "*.down_proj": "2:4"}))
    assert found[0].zeros["mlp.up_proj"] == 0
    assert found[0].zeros["mlp.down_proj"] == found[1].zeros["mlp.up_proj"] == 0.5
    dense = tiny(dtype=torch.float32)
    model, found = pruned(MagnitudeSparsity(scope="model"), Sparsity.parse(0.3))
    weights = [weight_of(find_layers(dense)[m.layer].get_submodule(m.name)).abs().tolist() for m in matrices_of(model)]
    expected = reference.zeros_of_the_model(weights, int(sum(m.size for m in matrices_of(model)) * 0.3))
    assert [m.zeros for layer in found for m in layer.matrices.values()] == expected


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), TaylorSparsity()], ids=lambda m: type(m).__name__)
def test_the_order_of_sequences_does_not_matter_to_the_last_bit(method):
    one, first = pruned(method)
    other, second = pruned(method, batches=ROWS[::-1])
    assert equal(one, other)
    assert [layer.error for layer in first] == [layer.error for layer in second]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloading_changes_nothing(tmp_path, offload):
    state = LayerState(tmp_path / "state", {})
    model, _ = pruned(offload=offload, state=state)
    assert equal(model, pruned()[0])
    assert not list((tmp_path / "state").glob(".hidden*"))  # files disappear with the pass


RESUMED = {
    "wanda": ({"method": Wanda()}, HALF),
    "sparsegpt": ({"method": SparseGPT()}, TWO_FOUR),
    "ria": ({"method": RIA(permutation="dealt"), "update": SparseGPT()}, TWO_FOUR),
    "taylor": ({"method": TaylorSparsity(scope="model")}, HALF),
    "owl": ({"method": ZPruner(), "allocation": OutlierWeighed(threshold=2.0)}, HALF),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_left_between_layers_and_taken_up_gives_equal_bits(tmp_path, name, architecture):
    kwargs, sparsity = RESUMED[name]
    method, rest = kwargs["method"], {k: v for k, v in kwargs.items() if k != "method"}

    def make():
        return tiny(architecture, dtype=torch.float32)

    undisturbed, expected = pruned(method, sparsity, model=make(), **rest)
    for layers in (1, 2):  # left twice
        work = prune_sparse(make(), ROWS, method, sparsity, state=LayerState(tmp_path, {"a": 1}), **rest)
        for _ in range(layers):
            next(work)
        work.close()
    model, found = pruned(method, sparsity, model=make(), state=LayerState(tmp_path, {"a": 1}), **rest)
    assert [layer.resumed for layer in found] == [True, True, False]
    assert equal(model, undisturbed)
    assert [layer.error for layer in found] == [layer.error for layer in expected]
    assert [layer.matrices for layer in found] == [layer.matrices for layer in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.orders.keys() == b.orders.keys()
        assert all(torch.equal(a.orders[key], b.orders[key]) for key in a.orders)


def test_a_state_of_other_settings_is_refused(tmp_path):
    LayerState(tmp_path, {"sparsity": "0.5", "model": "a"}).save("layer-00000", {"w": torch.ones(1)}, {"error": 0.5})
    with pytest.raises(ConfigError, match=r"pruned with sparsity 0.5; this run has 0.6..* fresh=True"):
        LayerState(tmp_path, {"sparsity": "0.6", "model": "a"})
    tensors, data = LayerState(tmp_path, {"sparsity": "0.5", "model": "a"}).load("layer-00000")
    assert tensors["w"] == 1
    assert data == {"error": 0.5}
    assert LayerState(tmp_path, {"sparsity": "0.6", "model": "a"}, fresh=True).load("layer-00000") is None
    (tmp_path / "layer-00001.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read.* to start again"):
        LayerState(tmp_path, {"sparsity": "0.6", "model": "a"}).load("layer-00001")


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_saved_zeros_are_counted_and_groups_checked(tmp_path, architecture):
    model, layers = pruned(RIA(permutation="dealt"), TWO_FOUR, model=tiny(architecture, dtype=torch.float32))
    orders = {f"{layer.index}.{name}": order for layer in layers for name, order in layer.orders.items()}
    save_orders(orders, tmp_path)
    plan = PruningPlan(model_class=type(model).__name__, groups=(), keep={}, config={},
                       provenance={"sparsity": sparsity_summary(layers)})  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    found = count_saved(tmp_path / "model", model, plan, load_orders(tmp_path))
    assert found["achieved"] == 0.5
    assert found["groups"] == found["groups_with_n_zeros"] == found["weights"] / 4
    with pytest.raises(OutputError, match="groups have fewer zeros than 2:4"):
        count_saved(tmp_path / "model", model, plan, {})
    path = tmp_path / "model/model.safetensors"
    weights = load_file(path)
    key = next(k for k in weights if k.endswith(("fc1.weight", "mlp.c_fc.weight")))
    weights[key][weights[key] == 0] = 1.0
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="was saved with 0 zeros"):
        count_saved(tmp_path / "model", model, plan, orders)
    save_file({k: v for k, v in weights.items() if k != key}, path, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="do not contain"):
        count_saved(tmp_path / "model", model, plan, orders)


def test_blocks_of_sparsegpt_hold_whole_groups():
    model, _ = pruned(SparseGPT(block=6), Sparsity.parse("3:4"))
    for layer in find_layers(model):
        for module in projections(layer).values():
            assert ((module.weight == 0).unflatten(1, (-1, 4)).sum(-1) == 3).all()


def test_singular_moments_are_named():
    short = [{"input_ids": token_ids(1, 3)}]
    with pytest.raises(Exception, match=r"self_attn.q_proj of layer 0: .* singular with damping=0; increase it"):
        pruned(SparseGPT(damping=0), batches=short)


def test_mixed_precision_sees_the_pruned_weights():
    """Autocast keeps the rounded weights of what is trainable, also when they have changed since."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = pruned(model=tiny(dtype=torch.float32))
        _, frozen = pruned(model=tiny(dtype=torch.float32).requires_grad_(requires_grad=False))
    assert [layer.error for layer in found] == [layer.error for layer in frozen]
    assert all(layer.error > 0 for layer in found)
