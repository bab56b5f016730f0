"""What others hold of the dense model and must hold of the pruned one: optimizer states, weight averages."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from hfprune.callbacks.target import Target
from hfprune.plan import PruningPlan
from hfprune.surgery import cut_optimizer_state, new_names, plan_cuts


def cut_restored_optimizers(checkpoint: dict[str, Any], target: Target, plan: PruningPlan, *, keep: bool) -> None:
    """Cuts, in place, the optimizer states of a dense checkpoint, which Lightning restores after pruning.

    Args:
        checkpoint: The checkpoint that Lightning is restoring.
        target: The model, still dense, and the trainer's optimizers for it.
        plan: What will be cut.
        keep: False drops states and schedules with a warning: adapters will train in place of these weights.
    """
    states = checkpoint.get("optimizer_states")
    if not states or not any(state["state"] for state in states):
        return
    if not keep:
        rank_zero_warn("The checkpoint's optimizer states belong to weights that adapters now replace: dropped.")
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        return
    cuts = plan_cuts(target.model, plan)
    gone = {name for name, after in new_names(target.model, plan).items() if after is None}
    names = {id(p): name for name, p in target.model.named_parameters()}
    lost = 0
    for optimizer, state in zip(target.module.trainer.optimizers, states, strict=True):
        order = [(names.get(id(p), ""), p.shape) for group in optimizer.param_groups for p in group["params"]]
        lost += cut_optimizer_state(state, order, cuts, gone=gone)
    if lost:
        rank_zero_warn(f"The optimizer starts afresh for {lost} parameters: its state is not of their shape.")


def average_anew(trainer: Trainer, module: LightningModule) -> None:
    """Lets weight averaging take its copy of the pruned model; the one it took in ``setup`` was dense."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.setup(trainer, module, "fit")
