"""Strategies under which pruning is known to be right; the others are refused by name."""

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from hfprune.arch import find_spec, is_supported
from hfprune.callbacks.target import Target
from hfprune.compensation import Compensation
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.errors import ConfigError


def check_strategy(trainer: Trainer, target: Target, method: Compensation | Criterion) -> None:
    """Raises ``ConfigError`` unless the trainer's strategy can prune ``target``; looks at nothing that is loaded.

    Args:
        trainer: The trainer.
        target: What is pruned.
        method: What runs layer by layer, if anything does.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        if isinstance(method, Compensation | LayerwiseCriterion):
            raise ConfigError(
                f"{type(method).__name__} goes through the layers one at a time, which is not supported under "
                "ModelParallelStrategy. Use a single device or DDP."
            )
        if "channels" in target.units:
            raise ConfigError(
                "Hidden channels run through embedding, layers and head, which ModelParallelStrategy gathers one at a "
                "time: leave 'channels' out of the units, or use a single device or DDP."
            )
        if _holds_experts(target):
            raise ConfigError(
                "Mixtures of experts are saved in other pieces than they have in memory, which the sharded reader of "
                "ModelParallelStrategy does not know, whatever the units: use a single device or DDP."
            )
        if not target.reloads_weights:
            raise ConfigError(
                "Under ModelParallelStrategy the pruned model must be sharded anew, and only a PruningModule knows "
                f"how; {type(target.module).__name__} shards itself. Use a PruningModule, or DDP."
            )
        size = strategy.device_mesh["tensor_parallel"].size()
        if size != 1:
            raise ConfigError(
                f"hfprune shards data-parallel (FSDP2), not tensor-parallel ({size}): use ModelParallelStrategy("
                f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            "TaylorImportanceCallback runs on a single device, under DDP, and under FSDP2 (ModelParallelStrategy); "
            f"{type(strategy).__name__} is not supported: it wraps or partitions the parameters that surgery "
            "replaces. To shard, use ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)."
        )


def _holds_experts(target: Target) -> bool:
    """Returns whether the model is known to have mixtures of experts."""
    if not target.known:
        return False
    model = target.shapes()
    return is_supported(model) and find_spec(model).experts is not None
