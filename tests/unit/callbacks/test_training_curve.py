"""The training curve: one point per optimizer step, few enough for a report, kept in checkpoints."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from hfprune.callbacks import training_curve
from hfprune.callbacks.training_curve import TrainingCurve


def train(curve, losses, *, accumulate=1, start=0):
    trainer = SimpleNamespace(global_step=start, callback_metrics={}, sanity_checking=False)
    module = SimpleNamespace(seen_tokens=10 * start * accumulate)
    for number, loss in enumerate(losses, start=1):
        module.seen_tokens += 10
        trainer.global_step = start + number // accumulate
        trainer.callback_metrics["train_loss"] = torch.tensor(loss)
        curve.batch(trainer, module)
    return trainer, module


def test_a_step_has_the_mean_loss_of_its_batches():
    curve = TrainingCurve()
    train(curve, [1.0, 3.0, 5.0, 7.0], accumulate=2)
    assert curve.to_dict() == {"train": [[1, 20, 2.0], [2, 40, 6.0]]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_long_curve_is_thinned_evenly(monkeypatch, accumulate):
    monkeypatch.setattr(training_curve, "MOST_POINTS", 4)
    curve = TrainingCurve()
    train(curve, [float(i // accumulate + 1) for i in range(32 * accumulate)], accumulate=accumulate)
    points = curve.to_dict()["train"]
    assert 4 <= len(points) < 8
    steps = [step for step, *_ in points]
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert [loss for *_, loss in points] == steps


def test_a_resumed_curve_continues():
    first, second = TrainingCurve(), TrainingCurve()
    train(first, [1.0, 2.0])
    second.load(first.to_dict())
    trainer, module = train(second, [3.0], start=2)
    trainer.callback_metrics["val_loss"] = torch.tensor(9.0)
    second.validation(trainer, module)
    assert second.to_dict() == {"train": [[1, 10, 1.0], [2, 20, 2.0], [3, 30, 3.0]], "validation": [[3, 30, 9.0]]}


def test_the_sanity_check_and_a_module_without_these_losses_leave_no_point():
    curve = TrainingCurve()
    trainer = SimpleNamespace(global_step=1, callback_metrics={}, sanity_checking=False)
    curve.batch(trainer, SimpleNamespace())
    trainer.callback_metrics["val_loss"], trainer.sanity_checking = torch.tensor(1.0), True
    curve.validation(trainer, SimpleNamespace())
    assert curve.to_dict() == {}
