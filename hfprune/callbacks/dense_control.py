"""The honest control: the dense model, tuned as the pruned one was."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from hfprune.callbacks.stages import Stages
from hfprune.errors import ConfigError
from hfprune.modules.causal_lm import PruningModule
from hfprune.recovery.lora import LoraRecovery

STAGE = "dense_tuned"
"""What its figures are called in reports."""


ONE_PROCESS = "The dense control is tuned by one process: leave out --recover_dense, or give --trainer.devices 1."


class DenseControl(Callback):
    """Tunes a dense ``PruningModule`` as recovery tunes a pruned one, and measures it.

    That a pruned and recovered model beats the dense one means nothing when the dense one has not seen the same data.
    Give it to a trainer of its own, with the settings, data and seed of the pruned run.

    Args:
        recovery: The adapters of the pruned run; None trains the weights themselves.
        latency: Measure speed, too.
        samples: Prompts from the evaluation text that the model continues.

    Attributes:
        measured: The figures, under ``dense_tuned``.

    Raises:
        ConfigError: The number of prompts is negative.
    """

    def __init__(self, recovery: LoraRecovery | None, *, latency: bool = False, samples: int = 2) -> None:
        self._recovery = recovery
        self.measured = Stages(latency=latency, samples=samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the model and adds adapters, before optimizers are built and checkpoints read."""
        if not isinstance(pl_module, PruningModule):
            raise ConfigError(f"DenseControl tunes a PruningModule, not a {type(pl_module).__name__}.")
        if trainer.world_size > 1:
            raise ConfigError(ONE_PROCESS)
        if stage != "fit":
            return
        pl_module.configure_model()
        pl_module.run_seed = torch.initial_seed() % 2**32
        if self._recovery is not None and pl_module.lora is None:
            pl_module.add_lora(self._recovery)
        elif self._recovery is None:
            pl_module.choose_trained()
        pl_module.trainer = trainer
        pl_module.check_training(adapters=self._recovery is not None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the tuned model, adapters merged."""
        assert isinstance(pl_module, PruningModule)
        self.measured.recovered(pl_module, trainer, merge=True, name=STAGE)

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured."""
        return self.measured.stages[STAGE]
