"""The pass through the layers against whole forward passes with hooks."""

import copy

import pytest
import torch

import hfprune
from hfprune.compensation import LeastSquares, OutputRegression
from hfprune.criteria import Reconstruction
from hfprune.models import backbone, find_groups, find_spec
from hfprune.models.layer_stream import LayerStream
from hfprune.models.projection import num_channels, weight_of
from hfprune.models.surgery import apply_plan
from hfprune.plan import PruningPlan
from hfprune.pruning.layerwise import LayerwisePass
from hfprune.utils.errors import CalibrationError
from hfprune.utils.least_squares import eliminate
from hfprune.utils.second_moments import Moments
from tests.helpers.models import NAMES, tiny, token_ids

CPU = torch.device("cpu")
BATCHES = [
    {"input_ids": token_ids(2, 12)},
    {"input_ids": token_ids(1, 9, seed=1)},
    {"input_ids": token_ids(2, 12, seed=2)},
]


def layer_outputs(model, index):
    """Outputs of one layer in whole forward passes."""
    found = []

    def hook(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(find_spec(model).layers)[index].register_forward_hook(hook)
    with torch.no_grad():
        for batch in BATCHES:
            backbone(model)(input_ids=batch["input_ids"], use_cache=False)
    handle.remove()
    return found


def inputs_of(model, name):
    """Inputs of one projection in whole forward passes, [N, C]."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: found.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in BATCHES:
            backbone(model)(input_ids=batch["input_ids"], use_cache=False)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("name", NAMES)
def test_stream_equals_whole_passes(name):
    model = tiny(name)
    stream = LayerStream(model, BATCHES, device=CPU)
    for index in range(3):
        for found, expected in zip(stream.outputs(index), layer_outputs(model, index), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        stream.advance(index)


def token_weights(model, name):
    """1 / mean square of the output of the layer that ``name`` lies in, token by token."""
    index = int(name.removeprefix(find_spec(model).layers + ".").split(".")[0])
    return torch.cat(
        [1 / torch.stack([t.square().mean() for t in o.flatten(0, 1)]) for o in layer_outputs(model, index)]
    )


def slow_pass(model, dense, groups, keep, compensation):
    """Layer by layer as the paper says it, each time with whole forward passes of the model as it is."""
    for group in groups:
        (part,) = group.inputs()
        module = model.get_submodule(part.module)
        x = inputs_of(model, part.module)
        paired = compensation.target == "dense"
        moments = Moments(num_channels(module, "in"), device=CPU, paired=paired)
        weights = token_weights(model, part.module) if compensation.tokens == "normalised" else None
        moments.add(x, inputs_of(dense, part.module) if paired else None, weights)
        kept = torch.tensor(keep[group.name])
        bias = None if module.bias is None else module.bias.detach()
        fit = compensation.fit(weight_of(module).detach(), bias, moments, kept)
        with torch.no_grad():
            weight_of(module).zero_()
            weight_of(module)[:, kept] = fit.weight
            if fit.bias is not None:
                module.bias.copy_(fit.bias)


def some(groups, width=11):
    return {g.name: tuple(sorted(torch.randperm(g.num_units)[:width].tolist())) for g in groups}


@pytest.mark.parametrize("target", ["module", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_sequential_fit_equals_whole_passes(name, target):
    model, slow, dense = tiny(name), tiny(name), tiny(name)
    groups = find_groups(model)
    tokens = "equal" if target == "dense" else "normalised"
    keep, compensation = some(groups), LeastSquares(damping=0.1, target=target, tokens=tokens)
    widths = {g.name: 11 for g in groups}
    found = LayerwisePass(model, groups, compensation=compensation).run(BATCHES, widths, keep=keep)
    slow_pass(slow, dense, groups, keep, compensation)
    assert found.keep == keep
    for (parameter, value), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-9, rtol=1e-9, msg=parameter)


def test_fit_on_dense_inputs():
    model, dense = tiny(), tiny()
    groups = find_groups(model)
    keep, compensation = some(groups), OutputRegression(sequential=False)
    LayerwisePass(model, groups, compensation=compensation).run(BATCHES, {g.name: 11 for g in groups}, keep=keep)
    for group in groups:
        alone = copy.deepcopy(dense)
        slow_pass(alone, dense, [group], keep, compensation)
        (part,) = group.inputs()
        expected = alone.get_submodule(part.module).weight
        torch.testing.assert_close(model.get_submodule(part.module).weight, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_fit_helps_the_pruned_model(name):
    """After surgery the fitted model's final hidden states are nearer to the dense ones than the plainly pruned."""

    def error(model):
        return sum(
            (a - b).square().sum() for a, b in zip(layer_outputs(model, 2), layer_outputs(tiny(name), 2), strict=True)
        )

    fitted, plain = tiny(name), tiny(name)
    groups = find_groups(fitted)
    keep = some(groups, 16)
    LayerwisePass(fitted, groups, compensation=LeastSquares(damping=0.01)).run(
        BATCHES, {g.name: 16 for g in groups}, keep=keep
    )
    spec = find_spec(plain)
    plan = PruningPlan(model_class=spec.model_class, groups=groups, keep=keep, config={spec.width_key: 16})
    apply_plan(fitted, plan)
    apply_plan(plain, plan)
    assert error(fitted) < 0.7 * error(plain)


def test_reconstruction_chooses_on_the_pruned_prefix():
    model, slow = tiny(), tiny()
    groups = find_groups(model)
    criterion, compensation = Reconstruction(damping=0.1), LeastSquares(damping=0.1)
    found = LayerwisePass(model, groups, compensation=compensation).run(
        BATCHES, {g.name: 11 for g in groups}, criterion=criterion
    )
    for group in groups:
        (part,) = group.inputs()
        moments = Moments(group.num_units, device=CPU)
        moments.add(inputs_of(slow, part.module), None, token_weights(slow, part.module))
        weight = weight_of(slow.get_submodule(part.module)).detach()
        keep, scores = eliminate(weight, moments, 11, unit_width=1, damping=0.1)
        assert found.keep[group.name] == tuple(keep.tolist())
        torch.testing.assert_close(found.scores[group.name], scores)
        slow_pass(slow, slow, [group], found.keep, compensation)
    assert all(0 < error < 1 for error in found.errors.values())


def test_ranks_add_up():
    """Two ranks' sums, added, give what one process finds on all batches."""
    groups = find_groups(tiny())
    keep, widths = some(groups), {g.name: 11 for g in groups}
    whole = tiny()
    LayerwisePass(whole, groups, compensation=LeastSquares()).run(BATCHES, widths, keep=keep)
    split = tiny()
    doubled = LayerwisePass(split, groups, compensation=LeastSquares(), reduce=lambda tensor: 2 * tensor)
    doubled.run(BATCHES, widths, keep=keep)  # as if the other rank had seen the same
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradients_stay_enabled():
    model = tiny()
    groups = find_groups(model)
    LayerwisePass(model, groups, compensation=LeastSquares(target="dense")).run(
        BATCHES, {g.name: 11 for g in groups}, keep=some(groups)
    )
    next(LayerStream(model, BATCHES, device=CPU).outputs(0))
    assert torch.is_grad_enabled()


def test_no_data():
    with pytest.raises(CalibrationError, match="no token"):
        LayerStream(tiny(), [], device=CPU)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("settings", [{}, {"target": "dense"}, {"sequential": False}], ids=str)
def test_weights_are_fitted_without_the_removed_sublayers(name, settings):
    """The fit is that of a model whose sub-layers and layer were removed before, but for targets of the dense model."""
    model, shorter = tiny(name), tiny(name)
    kinds = ("mlp", "heads", "attention_sublayers", "mlp_sublayers", "layers")
    groups = find_groups(model, kinds)
    lost = {"attention_sublayers": (0,), "mlp_sublayers": (2,)}
    keep = {g.name: () if g.layer in lost.get(g.kind, ()) else range(g.num_units) for g in groups}
    keep[next(g.name for g in groups if g.kind == "layers")] = (0, 2)
    whole = {g.name: keep[g.name] for g in groups if not g.slices}
    keep |= {g.name: range(g.num_units - 1 - (g.kind == "mlp") * 9) for g in groups if g.slices}
    plan = hfprune.make_plan(model, keep=keep, units=kinds)
    errors = hfprune.refit(model, plan, BATCHES, LeastSquares(damping=0.01, **settings))
    assert {n.removeprefix(find_spec(model).layers + ".") for n in errors} == {
        n for n in ("0.mlp", "2.self_attn", "2.attention") if f"{find_spec(model).layers}.{n}" in keep
    }
    hfprune.apply_plan(model, plan)
    hfprune.apply_plan(shorter, hfprune.make_plan(shorter, keep=whole, units=kinds[2:]))
    units = kinds[:2]
    rest = hfprune.make_plan(
        shorter,
        keep={g.name: range(g.num_units - 1 - (g.kind == "mlp") * 9) for g in find_groups(shorter, units)},
        units=units,
    )
    hfprune.refit(shorter, rest, BATCHES, LeastSquares(damping=0.01))
    hfprune.apply_plan(shorter, rest)
    same = [torch.allclose(p, q, rtol=1e-9) for p, q in zip(model.parameters(), shorter.parameters(), strict=True)]
    assert all(same) == (not settings)
    assert not any(m._forward_hooks for m in model.modules())
