"""Distillation from another model against loops, finite differences, and the model's own head."""

from contextlib import contextmanager

import pytest
import torch

from hfprune.models.forward import objective_sum, objective_sums
from hfprune.objectives import OBJECTIVES, chunked
from hfprune.objectives.distillation import DistillationObjective
from hfprune.objectives.teacher import CachedTopK, DenseModel, UnmaskedSelf
from hfprune.objectives.top_k import KnownTop
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids
from tests.reference import objectives as reference


def random_logits(seed, tokens=3, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (0.7, 0.5)])
def test_value_and_gradient(alpha, temperature):
    z, teacher, labels = random_logits(0), random_logits(1), torch.tensor([1, 0, 6])
    objective = DistillationObjective(alpha=alpha, temperature=temperature, teacher=DenseModel(torch.nn.Identity()))
    value, grad = objective.value_and_grad(z.clone(), labels, teacher.clone())
    for row in range(3):
        y, theirs = int(labels[row]), teacher[row].tolist()

        def loss(x, theirs=theirs, y=y):
            return reference.teacher_distillation(x, theirs, y, alpha, temperature)

        assert float(value[row]) == pytest.approx(loss(z[row].tolist()), abs=1e-12)
        expected = torch.tensor(reference.finite_difference(loss, z[row].tolist()), dtype=torch.float64)
        torch.testing.assert_close(grad[row], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_the_teacher_has_its_own_weights_and_head(packed):
    """The whole loss of a batch, teacher and student by plain forward passes; packed rows are taken apart."""
    student, teacher = tiny("llama_untied_bias", seed=1), tiny("llama_untied_bias", seed=2)
    ids, labels = token_ids(1, 9), token_ids(1, 9).clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    cuts = [slice(0, 9)]
    if packed:
        batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
        cuts = [slice(0, 5), slice(5, 9)]
    objective = DistillationObjective(alpha=0.6, temperature=1.5, teacher=DenseModel(teacher))
    total, valid = objective_sum(student, objective, batch)
    expected, count = 0.0, 0
    for cut in cuts:
        with torch.no_grad():
            z, t = (m(input_ids=ids[:, cut]).logits[0].tolist() for m in (student, teacher))
        targets = labels[0, cut].tolist()[1:]
        for mine, theirs, y in zip(z, t, targets, strict=False):
            if y != -100:
                expected += reference.teacher_distillation(mine, theirs, y, 0.6, 1.5)
                count += 1
    assert int(valid.sum()) == count
    assert float(total.detach()) == pytest.approx(expected, rel=1e-10)
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_one_pass_for_several_objectives_gives_each_teacher_the_tokens_that_count(chunk, monkeypatch):
    """Every objective of a pass counts other tokens; in memory or stored, the teacher answers for these alone."""
    monkeypatch.setattr(chunked, "chunk_tokens", lambda *args, **kwargs: chunk)
    student, teacher = tiny("llama_untied_bias", seed=1), tiny("llama_untied_bias", seed=2)
    ids = token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, 5:] = -100
    batch = {"input_ids": ids, "labels": labels}

    def lookup(batch, valid):
        with torch.no_grad():
            logits = teacher(input_ids=batch["input_ids"]).logits[valid] / 1.5
        log_p, tokens = logits.log_softmax(-1).topk(5, -1)
        return KnownTop(log_p, tokens, (1 - log_p.exp().sum(-1)).log())

    for source in (DenseModel(teacher), CachedTopK(lookup)):
        followed = DistillationObjective(alpha=0.6, temperature=1.5, teacher=source)
        alone, valid = objective_sum(student, followed, batch)
        (_, every), (together, counted) = objective_sums(student, [OBJECTIVES.get("entropy"), followed], batch)
        assert every.all()
        assert torch.equal(counted, valid)
        assert not valid.all()
        assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-12)


def test_the_student_is_its_own_teacher_without_its_masks():
    student, masked = tiny("llama_untied_bias"), []

    @contextmanager
    def unmasked():
        masked.append(torch.is_grad_enabled())
        yield

    predictions = UnmaskedSelf(unmasked).predict(student, {}, lambda model: model)
    assert predictions is student
    assert masked == [False]


@pytest.mark.parametrize("settings", [{"alpha": 1.1, "temperature": 1.0}, {"alpha": 1.0, "temperature": 0.0}])
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match="alpha="):
        DistillationObjective(teacher=DenseModel(torch.nn.Identity()), **settings)
