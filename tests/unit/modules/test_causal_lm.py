"""The LightningModule: its losses, its schedule, its checkpoints."""

from itertools import pairwise

import pytest
import torch
from lightning import Trainer

from hfprune import PruningModule
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny, token_ids


@pytest.fixture
def module(tmp_path):
    module = PruningModule(save_tiny(tmp_path / "m"), dtype="float64")
    module.configure_model()
    return module


def batch(labels=None, pad=0):
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, -pad:] = 0
    return {"input_ids": ids, "attention_mask": mask} | ({} if labels is None else {"labels": labels})


def test_loss_is_transformers_own(module, monkeypatch):
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    labels = token_ids(3, 10).clone()
    labels[:, :4] = -100
    data = batch(labels)
    expected = module.model(input_ids=data["input_ids"], labels=labels).loss
    torch.testing.assert_close(module.training_step(data, 0), expected.float(), atol=1e-6, rtol=0)


def test_objective_counts_real_tokens_only(module):
    full, padded = module.calibration_step(batch(), 0), module.calibration_step(batch(pad=4), 0)
    assert full.num_tokens.tolist() == [10, 10, 10]
    assert full.padding is None
    assert padded.num_tokens.tolist() == [6, 10, 10]
    assert padded.padding.sum() == 4


def test_no_full_logits_are_made(module, monkeypatch):
    forward, calls = module.model.lm_head.forward, []

    def few(states):
        calls.append(states.shape[:-1].numel())
        return forward(states)

    monkeypatch.setattr(module.model.lm_head, "forward", few)
    for _ in range(2):
        module.calibration_step(batch(), 0).total.backward()
    assert calls == [4]  # the comparison of the head with its table, once; never the 30 tokens of a batch


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_cosine_schedule(module, warmup, monkeypatch):
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", property(lambda self: 10))
    module.warmup_ratio = warmup
    module.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    configured = module.configure_optimizers()
    factor = configured["lr_scheduler"]["scheduler"].lr_lambdas[0]
    values = [factor(step) for step in range(11)]
    peak = int(10 * warmup)
    assert values[peak] == pytest.approx(1)
    assert values[10] == pytest.approx(0)
    assert all(a < b for a, b in pairwise(values[: peak + 1]))
    assert all(a > b for a, b in pairwise(values[peak:]))
    assert values[(10 + peak) // 2] == pytest.approx(0.5)


def test_foreign_checkpoint_is_refused(module):
    with pytest.raises(ConfigError, match="not written by a PruningModule"):
        module.on_load_checkpoint({"state_dict": {}})


@pytest.mark.parametrize(
    "kwargs", [{"learning_rate": 0}, {"weight_decay": -1}, {"warmup_ratio": 1.0}, {"objective": "entropie"}]
)
def test_arguments_are_checked(tmp_path, kwargs):
    folder = save_tiny(tmp_path / "m")
    with pytest.raises(ConfigError):
        PruningModule(folder, **kwargs)


def test_shapes_are_known_before_weights(tmp_path):
    module = PruningModule(save_tiny(tmp_path / "m"))
    assert module.vocab_size == 61
    assert module.max_positions == 64
    assert next(module.meta_model().parameters()).is_meta
    assert module.model is None
    assert [p.shape for p in module.meta_model().parameters()] == [p.shape for p in tiny().parameters()]
