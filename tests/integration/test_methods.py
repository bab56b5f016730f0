"""Every configuration of a published method prunes a tiny model, with its own criterion, objective and stages."""

from pathlib import Path

import pytest

from hfprune import PruneTrainer, TaylorImportanceCallback
from hfprune.cli.launch import CLASSES
from tests.helpers.models import save_tiny

FOLDER = Path(__file__).resolve().parents[2] / "configs/methods"
SMALL = ["--data.seq_len=16", "--data.calibration_sequences=3", "--data.eval_windows=0", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_method_prunes(path, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = CLASSES["prune"]("prune", [f"--config={path}", f"--model.path={folder}", "--output_dir=out", *SMALL])
    (importance,) = (c for c in cli.trainer.callbacks if isinstance(c, TaylorImportanceCallback))
    trainer = PruneTrainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[importance], max_epochs=1,
    )  # fmt: skip
    trainer.prune(cli.model, cli.datamodule)
    plan = cli.model.plan
    named = cli.config.importance.criterion.class_path
    assert type(importance.options.criterion).__name__ == named.rpartition(".")[2]
    assert plan.provenance["criterion"] == importance.options.criterion.describe()
    assert (plan.provenance["distillation"] is not None) == path.stem.startswith("sdmprune")
    assert tuple(plan.widths().values()) == importance.resolved.widths
