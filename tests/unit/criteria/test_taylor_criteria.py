"""LLM-Pruner's and SDMPrune's scores and Fisher against loops, for MLP neurons and groups of attention heads."""

import pytest
import torch

from hfprune.criteria import CoupledTaylor, Fisher, VectorTaylor, WeightTaylor, resolve_objective
from hfprune.models import find_groups
from hfprune.plan import Group, Slice
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.toys import TOYS, calibrate, check, head_groups, plain, sequences, toy
from tests.reference import taylor as slow

FORMS = [
    (VectorTaylor(), "vectorize", "sequence"),
    (WeightTaylor(), "param_first", "sequence"),
    (WeightTaylor(gradient="dataset"), "param_first", "dataset"),
    (WeightTaylor(salience="param_second"), "param_second", "sequence"),
    (WeightTaylor(salience="param_mix"), "param_mix", "sequence"),
    (WeightTaylor(salience="param_mix", gradient="dataset"), "param_mix", "dataset"),
]


def all_groups(model):
    return (*find_groups(model), *head_groups(model))


@pytest.mark.parametrize(("act", "bias"), TOYS)
@pytest.mark.parametrize(("criterion", "salience", "gradient"), FORMS, ids=lambda v: v if isinstance(v, str) else "")
def test_llm_pruner_equals_loops(criterion, salience, gradient, act, bias):
    expected = slow.llm_pruner(
        toy(act, bias), sequences(), "cross_entropy", plain(all_groups(toy())), salience, gradient=gradient
    )
    check(calibrate(toy(act, bias), criterion), expected)


@pytest.mark.parametrize("matrices", ["mean", "max", "prod", "first", "second", "last"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_reductions_of_matrices_equal_loops(matrices, kv_heads):
    """Query heads fold onto their own KV head: 4 query heads on 1, and as many as there are."""
    model = toy(kv_heads=kv_heads)
    groups = plain(all_groups(model))
    for criterion, salience in ((VectorTaylor, "vectorize"), (WeightTaylor, "param_first")):
        found = calibrate(toy(kv_heads=kv_heads), criterion(matrices=matrices))
        check(found, slow.llm_pruner(model, sequences(), "cross_entropy", groups, salience, matrices=matrices))


def test_forms_differ():
    """What the loops would not notice if two forms were one: every pair ranks or scales differently."""
    found = [calibrate(toy(), criterion) for criterion, _, _ in FORMS]
    for i, one in enumerate(found):
        for other in found[:i]:
            name = "model.layers.0.mlp"
            assert (one[name] - other[name]).abs().max() > 1e-4 * one[name].max()


def test_vectors_without_the_bias_term_would_differ():
    """Identity 3: a row's sum of w dw is that of its output times gradient, less the bias's share."""
    criterion, wrong = VectorTaylor(), VectorTaylor()
    original = wrong.rows

    def without_bias(group, signals, batch, moments):
        ((part, s),) = signals.items()
        bare = type(s)(input=s.input, output=s.output, grad=s.grad, weight=s.weight, bias=None)
        return original(group, {part: bare}, batch, moments)

    wrong.rows = without_bias
    right, other = calibrate(toy(), criterion), calibrate(toy(), wrong)
    assert all((right[name] - other[name]).abs().max() > 1e-3 * right[name].max() for name in right)


@pytest.mark.parametrize(("act", "bias"), TOYS)
def test_coupled_equals_loops(act, bias):
    model = toy(act, bias)
    groups = find_groups(model)
    found = calibrate(toy(act, bias), CoupledTaylor(), groups=groups)
    gradients = slow.mean_gradients(model, sequences(), slow.objective_of("cross_entropy"))
    check(found, slow.coupled(model, gradients, plain(groups)))
    for dropped in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        wrong = slow.coupled(model, gradients, plain(groups), drop=[dropped])
        with pytest.raises(AssertionError):
            check(found, wrong)


def test_coupled_is_bounded_by_the_identities():
    """sum_k abs(E) >= abs(2 A + B) for one sequence: the triangle inequality over k."""
    groups, batch = find_groups(toy(bias=False)), [{"input_ids": sequences()[0][None]}]
    coupled = calibrate(toy(bias=False), CoupledTaylor(), groups=groups, batches=batch)
    model = toy(bias=False)
    (gradients,) = slow.mean_gradients(model, sequences()[:1], slow.objective_of("cross_entropy"))
    weights = dict(model.named_parameters())
    for group in groups:
        names = [f"{s.module}.weight" for s in group.slices]
        gate, up = ((weights[n] * gradients[n]).sum(1) for n in names[:2])
        down = (weights[names[2]] * gradients[names[2]]).sum(0)
        assert (coupled[group.name] * 8 >= (gate + up + down).abs() - 1e-12).all()


def test_coupled_refuses_matrices_of_different_shapes():
    with pytest.raises(ConfigError, match=r"CoupledTaylor requires .*self_attn have shapes \(8, 8\), \(4, 8\)"):
        calibrate(toy(), CoupledTaylor())


def test_coupled_needs_every_projection_to_take_part():
    """A gate whose output is not used: its gradient never comes."""
    model = toy()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) + 0 * mlp.gate_proj(x).detach())
    with pytest.raises(CalibrationError, match=r"all projections of model\.layers\.0\.mlp together, but only"):
        calibrate(model, CoupledTaylor(), groups=find_groups(model))


@pytest.mark.parametrize("reduction", ["per_token", "per_sequence"])
@pytest.mark.parametrize(("act", "bias"), TOYS[:3])
def test_fisher_equals_loops(act, bias, reduction):
    model = toy(act, bias)
    groups = all_groups(model)
    consumers = {
        g.name: [(g.inputs()[0].module, g.inputs()[0].channels([u])) for u in range(g.num_units)] for g in groups
    }
    labels = [slow.drawn_labels(model, ids) for ids in sequences()]
    expected = slow.fisher(model, sequences(), labels, consumers, per_token=reduction == "per_token")
    check(calibrate(toy(act, bias), Fisher(reduction=reduction), "sampled"), expected)
    labels[0][0] = (labels[0][0] + 1) % 13
    with pytest.raises(AssertionError):
        check(calibrate(toy(act, bias), Fisher(reduction=reduction), "sampled"),
              slow.fisher(model, sequences(), labels, consumers, per_token=reduction == "per_token"))  # fmt: skip


def test_half_the_mean_fisher_score_is_the_kl_of_a_small_change():
    """Zeroing a unit is too large a step; shrinking it by 1 % at one token is not: KL -> (eps^2 / 2) E[(a g)^2]."""
    from hfprune.objectives import OBJECTIVES
    from hfprune.objectives.sampled import Sampled

    model, ids = toy("gelu", bias=False), sequences()[1]
    (group, *_) = find_groups(model)
    found = []
    draws = 400
    original = OBJECTIVES._items["sampled"]
    try:
        for seed in range(draws):
            OBJECTIVES._items["sampled"] = Sampled(seed)
            batch = [{"input_ids": ids[None]}]
            found.append(calibrate(model, Fisher(), "sampled", groups=[group], batches=batch)[group.name] * len(ids))
    finally:
        OBJECTIVES._items["sampled"] = original
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        for unit in range(3):
            coarse, fine = (_kl_of_shrinking(model, group, ids, log_p, unit, step) / step**2 for step in (0.02, 0.01))
            limit = 2 * fine - coarse  # the error of each is proportional to its step
            values = torch.stack(found)[:, unit].double()
            error = float(values.std()) / draws**0.5
            assert error < 0.1 * float(values.mean())
            assert 0.5 * float(values.mean()) == pytest.approx(limit, abs=0.5 * 3 * error)


def _kl_of_shrinking(model, group, ids, log_p, unit, step):
    """The KL to the model whose unit is smaller by ``step`` at one token, summed over these tokens."""
    kl = 0.0
    for t in range(len(ids)):

        def shrink(module, args, t=t):
            x = args[0].clone()
            x[0, t, unit] *= 1 - step
            return (x,)

        handle = model.get_submodule(group.inputs()[0].module).register_forward_pre_hook(shrink)
        changed = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        handle.remove()
        kl += float((log_p.exp() * (log_p - changed)).sum())
    return kl


def test_units_whose_channels_do_not_fold_are_refused():
    slices = (Slice(module="a", side="out", width=3), Slice(module="b", side="in", width=2))
    group = Group(name="odd", kind="heads", num_units=2, slices=slices)
    for criterion in (VectorTaylor(), WeightTaylor()):
        with pytest.raises(ConfigError, match=r"odd own \[3, 2\] channels"):
            criterion.check(group, [(6, 4), (4, 4)])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WeightTaylor(salience="vectorize"), "vectorize use VectorTaylor"),
        (lambda: WeightTaylor(gradient="batch"), "choose one of sequence, dataset"),
        (lambda: WeightTaylor(salience="param_second", gradient="dataset"), "use gradient='sequence'"),
        (lambda: VectorTaylor(matrices="median"), "choose one of sum, mean, max, prod, first, second, last"),
        (lambda: CoupledTaylor(weighting="batch"), "weighting='batch' is unknown"),
        (lambda: Fisher(reduction="signed"), "reduction='signed' is unknown"),
        (lambda: resolve_objective(Fisher(), "entropy"), "Fisher supports the objective sampled or cross_entropy"),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
    assert resolve_objective(Fisher(), None) == "sampled"
