"""A step is the mean over its tokens: accumulated batches of unequal length are one large batch."""

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from hfprune import PruningModule
from tests.helpers.models import save_tiny, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")

LENGTHS = (4, 12, 7, 9, 11)


class Batches(LightningDataModule):
    """Sequences in batches of ``size``, padded on the right; loss on the second half of each."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        rows = [token_ids(1, n, seed=n)[0] for n in LENGTHS]
        return DataLoader(rows, batch_size=self.size, collate_fn=self.collate)

    def collate(self, rows):
        batch = {"input_ids": torch.zeros(len(rows), 12, dtype=torch.int64)}
        batch |= {"attention_mask": batch["input_ids"].clone(), "labels": batch["input_ids"] - 100}
        for i, row in enumerate(rows):
            batch["input_ids"][i, : len(row)], batch["attention_mask"][i, : len(row)] = row, 1
            batch["labels"][i, len(row) // 2 : len(row)] = row[len(row) // 2 :]
        return batch


class Plain(PruningModule):
    """Steps along the gradient, so that weights show it."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), dtype=torch.float64)


def trained(folder, size, accumulate, *, clip=None):
    module = Plain(folder)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **quiet
    )
    trainer.fit(module, datamodule=Batches(size))
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("size", "accumulate", "clip"), [(1, 5, None), (2, 3, None), (1, 8, None), (2, 3, 0.1)])
def test_accumulated_batches_are_one_batch(folder, size, accumulate, clip):
    """Also where the last window is not full, and when gradients are clipped after they were weighted."""
    whole, parts = trained(folder, 5, 1, clip=clip), trained(folder, size, accumulate, clip=clip)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6)


def test_the_step_is_the_gradient_of_the_mean(folder):
    """Against the loss that transformers computes over the supervised tokens of the batch."""
    module = Plain(folder)
    module.configure_model()
    batch = Batches(5).collate([token_ids(1, n, seed=n)[0] for n in LENGTHS])
    model = module.model
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    expected = {f"model.{name}": p.detach() - p.grad for name, p in model.named_parameters()}
    for name, weight in trained(folder, 5, 1).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
