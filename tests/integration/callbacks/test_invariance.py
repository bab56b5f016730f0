"""Kept units do not depend on how the calibration data is batched, padded or packed; nor on mixed precision's sums."""

import pytest
import torch

from hfprune import ActivationTaylor, PruneTrainer, PruningModule, TaylorImportanceCallback, WeightTaylor
from tests.helpers.models import save_tiny
from tests.helpers.ragged import LENGTHS, RaggedData

LAYOUTS = [
    (1, "right"),
    (3, "right"),
    (8, "right"),
    (1, "left"),
    (3, "left"),
    (8, "left"),
    (3, "packed"),
    (8, "packed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def scores(folder, batch_size, layout, *, dtype="float32", precision="32-true", objective="entropy", **kwargs):
    importance = TaylorImportanceCallback(pruning_ratio=0.2, **kwargs)
    trainer = PruneTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, precision=precision, callbacks=[importance],
    )  # fmt: skip
    module = PruningModule(folder, dtype=dtype, objective=objective)
    trainer.prune(module, RaggedData(batch_size, layout))
    return importance.importance, module.plan


@pytest.mark.parametrize("criterion", [ActivationTaylor(), ActivationTaylor(reduction="per_sequence"), WeightTaylor()])
@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
def test_bit_equal_for_any_batch_padding_and_packing(folder, criterion, objective):
    """In float32, where batched matrix products differ in the last bits: each sequence is run alone."""
    expected, plan = scores(folder, 1, "right", criterion=criterion, objective=objective)
    for batch_size, layout in LAYOUTS[1:]:
        found, other = scores(folder, batch_size, layout, criterion=criterion, objective=objective)
        assert other.keep == plan.keep
        assert all(torch.equal(found[name], score) for name, score in expected.items()), (batch_size, layout)
    assert plan.provenance["calibration"]["sequences"] == len(LENGTHS)


@pytest.mark.parametrize("criterion", [ActivationTaylor(), ActivationTaylor(reduction="signed"), WeightTaylor()])
@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
def test_batches_as_they_come_agree_in_float64(folder, criterion, objective):
    """Scores agree within 1e-10 for sequences of different lengths, padding on either side, batches of 1, 3 and 8."""
    settings = {"criterion": criterion, "objective": objective, "dtype": "float64"}
    expected, plan = scores(folder, 1, "right", **settings)
    for batch_size, layout in LAYOUTS[1:]:
        found, other = scores(folder, batch_size, layout, exact=False, **settings)
        assert other.keep == plan.keep
        for name, score in expected.items():
            torch.testing.assert_close(found[name], score, atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_reduced_precision_is_close_and_accumulates_exactly(folder, precision):
    """Products of bfloat16 activations and gradients are formed and added in full precision (fp16 runs as bf16 here)."""
    full, _ = scores(folder, 1, "right")
    reduced, _ = scores(folder, 1, "right", precision=precision)
    again, _ = scores(folder, 8, "left", precision=precision)
    for name, score in full.items():
        assert reduced[name].dtype == torch.float64
        assert torch.equal(reduced[name], again[name])
        relative = (reduced[name] - score).norm() / score.norm()
        assert 1e-7 < relative < 0.05
        assert torch.unique(reduced[name]).numel() == score.numel()  # a bfloat16 sum would collide
