"""Self-distillation in two stages against two separate models (SDMPrune; acceptance test 6)."""

import copy

import pytest
import torch

from hfprune.allocation import uniform_keep
from hfprune.criteria import ActivationNorm, ActivationTaylor, CoupledTaylor, Fisher, SelfDistillation
from hfprune.models import find_groups
from hfprune.models.forward import objective_sum
from hfprune.models.surgery import mask_plan
from hfprune.objectives.self_distillation import SelfDistillationObjective
from hfprune.plan import PruningPlan
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum
from hfprune.pruning.hooks import UnitMask
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.toys import calibrate, check, plain, sequences, toy
from tests.reference import taylor as slow


def distilled(model, criterion, keep, *, alpha, temperature):
    groups = find_groups(model)
    mask = UnitMask(model, groups, keep)
    objective = SelfDistillationObjective(alpha=alpha, temperature=temperature, unmasked=mask.lifted)
    accumulator = ImportanceAccumulator(model, groups, criterion)
    with mask.active(), accumulator.recording():
        for ids in sequences():

            def step(ids=ids):
                total, valid = objective_sum(model, objective, {"input_ids": ids[None]})
                return ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=None)

            accumulator.step(step)
    assert not any(m._forward_pre_hooks for m in model.modules())
    return accumulator.scores()


def kept_of(model, width):
    groups = find_groups(model)
    return uniform_keep(calibrate(model, CoupledTaylor(), groups=groups), groups, width)


@pytest.mark.parametrize(("act", "bias"), [("silu", True), ("gelu", False)])
def test_second_stage_equals_a_student_and_a_teacher_of_their_own(act, bias):
    """The student a copy with its removed neurons zeroed, whole logits, autograd into its weights."""
    alpha, temperature = 0.4, 0.2
    model = toy(act, bias)
    keep = kept_of(model, 4)
    found = distilled(model, CoupledTaylor(), keep, alpha=alpha, temperature=temperature)
    teacher, student = toy(act, bias), toy(act, bias)
    groups = find_groups(model)
    mask_plan(student, PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={}))

    def loss(model, ids, alpha=alpha):
        log_p = torch.log_softmax(model(ids[None]).logits[0], -1)
        with torch.no_grad():
            log_q = torch.log_softmax(teacher(ids[None]).logits[0] / temperature, -1)
        ce = -log_p[:-1].gather(1, ids[1:, None]).mean()
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        return len(ids) * ((1 - alpha) * ce + alpha * kl), len(ids)

    expected = slow.coupled(student, slow.mean_gradients(student, sequences(), loss), plain(groups))
    check(found, expected, rtol=1e-6)  # the norms' float32 rounds gradients that were scaled in another order
    for group in groups:
        removed = set(range(6)) - set(keep[group.name])
        assert all(found[group.name][j] == 0 for j in removed)
        assert all(found[group.name][j] > 0 for j in keep[group.name])
    wrong = slow.mean_gradients(student, sequences(), lambda m, ids: loss(m, ids, alpha=0.5))
    with pytest.raises(AssertionError):
        check(found, slow.coupled(student, wrong, plain(groups)), rtol=1e-2)


def test_at_equality_kl_has_no_gradient_and_near_it_the_ranking_of_entropy():
    model = toy("silu", bias=False)
    everything = {g.name: range(6) for g in find_groups(model)}
    criterion = ActivationTaylor()
    with pytest.raises(CalibrationError, match=r"All scores of model\.layers\.0\.mlp are zero"):
        distilled(copy.deepcopy(model), criterion, everything, alpha=1, temperature=1)
    entropy = calibrate(model, criterion, "entropy", groups=find_groups(model))
    correlations = []
    for temperature in (0.2, 0.9, 0.999):
        scores = distilled(model, criterion, everything, alpha=1, temperature=temperature)
        ranks = [torch.cat([s.argsort().argsort() for s in found.values()]).double() for found in (scores, entropy)]
        correlations.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    assert correlations[-1] == pytest.approx(1)
    assert correlations[0] <= correlations[1] <= correlations[2]


def test_first_stage_must_keep_what_the_budget_keeps():
    groups = find_groups(toy())
    assert SelfDistillation().first_widths(groups, [5, 5]) == [5, 5]  # int(6 * 0.975)
    with pytest.raises(ConfigError, match=r"keeps 3 of the 6 units of model\.layers\.0\.mlp, fewer than the 4"):
        SelfDistillation(first_stage=0.5).first_widths(groups, [4, 3])
    published = SelfDistillation()
    big = type(groups[0])(name="g", kind="mlp", num_units=8192, slices=groups[0].slices)
    assert published.first_widths([big], [0]) == [7987]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SelfDistillation(alpha=2), "alpha in"),
        (lambda: SelfDistillation(temperature=0), "temperature > 0"),
        (lambda: SelfDistillation(first_stage=1), "first_stage in"),
        (lambda: SelfDistillation().check(ActivationNorm(), None), "ActivationNorm does not\\."),
        (lambda: SelfDistillation().check(Fisher(), None), "Fisher does not\\."),
        (lambda: SelfDistillation().check(CoupledTaylor(), "entropy"), "remove objective='entropy'"),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
