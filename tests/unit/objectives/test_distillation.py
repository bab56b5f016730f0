"""SDMPrune's loss against loops and autograd, and what it is at equality (acceptance test 6)."""

import pytest
import torch

from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES, OutputHead, chunked_objective
from hfprune.objectives.distillation import distillation_kl
from hfprune.objectives.self_distillation import SelfDistillationObjective
from hfprune.objectives.teacher import HiddenPredictions
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids
from tests.helpers.ragged import padded
from tests.reference import objectives as slow


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_kl_equals_the_loop_reference(temperature):
    z, teacher = 3 * torch.randn(5, 7, dtype=torch.float64), 3 * torch.randn(5, 7, dtype=torch.float64)
    found = distillation_kl(z.clone(), teacher.clone(), temperature=temperature)
    for t, (row, target) in enumerate(zip(z.tolist(), teacher.tolist(), strict=True)):
        assert found.value[t] == pytest.approx(slow.kl(target, row, temperature), abs=1e-12)
        torch.testing.assert_close(found.grad[t].tolist(), slow.kl_grad(target, row, temperature), atol=1e-12, rtol=0)
        numeric = slow.finite_difference(lambda v, q=target: slow.kl(q, v, temperature), row)
        torch.testing.assert_close(found.grad[t].tolist(), numeric, atol=1e-7, rtol=0)


def test_kl_with_a_masked_vocabulary_and_underflow_is_finite():
    z = torch.tensor([[0.0, 1.0, -torch.inf, -2000.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0, -torch.inf, -2000.0]], dtype=torch.float64)
    found = distillation_kl(z.clone(), teacher.clone())
    assert found.value[0] == pytest.approx(slow.kl([1.0, 0.0], [0.0, 1.0]))
    assert found.grad.isfinite().all()
    assert found.grad[0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_mixture_equals_autograd_of_the_published_means(alpha):
    """(1 - alpha) mean CE over T - 1 tokens + alpha mean KL over T tokens, times T; two ragged rows; any chunk size."""
    lengths, temperature = (6, 3), 0.3
    ids, mask = padded([token_ids(1, n, seed=n, vocab=11)[0] for n in lengths], "right").values()
    weight = torch.randn(11, 4, dtype=torch.float64)
    hidden = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    expected = 0
    for row, length in enumerate(lengths):
        log_p = torch.log_softmax(hidden[row, :length] @ weight.T, -1)
        log_q = torch.log_softmax(teacher[row, :length] @ weight.T / temperature, -1)
        ce = -log_p[:-1].gather(1, ids[row, 1:length, None]).mean()
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        expected = expected + length * ((1 - alpha) * ce + alpha * kl)
    (grad,) = torch.autograd.grad(expected, hidden)
    objective = SelfDistillationObjective(alpha=alpha, temperature=temperature)
    targets, valid = objective.targets(ids, mask, None)
    for size in (1, 2**20):
        head = OutputHead(weight=weight)
        predictions = HiddenPredictions(teacher, head).at(valid)
        total = chunked_objective(objective, hidden[valid], head, targets[valid], predictions, chunk_bytes=size)
        assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        (found,) = torch.autograd.grad(total, hidden)
        torch.testing.assert_close(found, grad, atol=1e-12, rtol=1e-12)


def test_at_equality_the_gradient_is_the_entropy_gradient_as_the_temperature_nears_one():
    """Zero for t = 1; (1/t - 1)^-1 (p - softmax(z/t)) -> dEnt/dz: error 0.5 % at t = 0.99."""
    z = 2 * torch.randn(1, 11, dtype=torch.float64)
    assert (distillation_kl(z.clone(), z.clone()).grad == 0).all()
    entropy = OBJECTIVES.get("entropy").value_and_grad(z.clone(), None).grad
    errors = []
    for t in (0.9, 0.99, 0.999):
        scaled = distillation_kl(z.clone(), z.clone(), temperature=t).grad / (1 / t - 1)
        errors.append(float((scaled - entropy).norm() / entropy.norm()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[1] < 0.03


def test_the_teacher_is_run_without_gradients_and_in_its_context():
    from contextlib import contextmanager

    model, entered = tiny(), []

    @contextmanager
    def teacher():
        handle = model.model.norm.register_forward_hook(lambda *_: entered.append(torch.is_grad_enabled()))
        yield
        handle.remove()

    with torch.enable_grad():
        total, valid = objective_sum(
            model, SelfDistillationObjective(alpha=1, temperature=1, unmasked=teacher), {"input_ids": token_ids()}
        )
    assert entered == [False]
    assert float(total.detach()) == pytest.approx(0, abs=1e-12)
    assert valid.all()


@pytest.mark.parametrize(("alpha", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0)])
def test_settings_are_checked(alpha, temperature):
    with pytest.raises(ConfigError, match="alpha=.* temperature="):
        SelfDistillationObjective(alpha=alpha, temperature=temperature)
