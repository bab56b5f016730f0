"""Restoring modules from checkpoints of pruned models."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningModule

from hfprune.callbacks.user_module import ForeignTarget
from hfprune.io.checkpoint_record import Record
from hfprune.modules.causal_lm import PruningModule
from hfprune.utils.errors import ConfigError

Module = TypeVar("Module", bound=LightningModule)


def load_from_checkpoint(module_class: type[Module], checkpoint_path: str | Path, **kwargs: Any) -> Module:
    """Returns a LightningModule with the pruned shapes and the weights of a checkpoint.

    ``module_class.load_from_checkpoint`` builds the dense module from the hyper-parameters in the checkpoint. Before
    the weights are restored, the plan in the checkpoint is applied and adapters are added. A checkpoint without a plan
    is loaded as by Lightning.

    Args:
        module_class: A user-defined class, or ``PruningModule``.
        checkpoint_path: Checkpoint file of a Lightning ``Trainer``.
        kwargs: Arguments of ``module_class.load_from_checkpoint`` (``map_location``, ``strict``, ``weights_only``, ...)
            and of the constructor of ``module_class``, if the checkpoint does not contain them.

    Returns:
        The module. ``module.MODEL.save_pretrained(folder)`` writes its model as a Hugging Face folder.

    Raises:
        ConfigError: The checkpoint was written for another dense model, or is a folder of shards.

    Example:
        .. code-block:: python

            best = trainer.checkpoint_callback.best_model_path
            module = hfprune.load_from_checkpoint(FineTuner, best)
            module.lm.save_pretrained("pruned/model")
    """
    if Path(checkpoint_path).is_dir():
        raise ConfigError(
            f"checkpoint_path='{checkpoint_path}' is a folder of shards: restore it with fit or validate and the "
            "strategy that wrote it."
        )
    if issubclass(module_class, PruningModule):  # it applies the plan itself
        return module_class.load_from_checkpoint(checkpoint_path, **kwargs)
    with _replaying(module_class):
        return module_class.load_from_checkpoint(checkpoint_path, **kwargs)


@contextmanager
def _replaying(module_class: type[LightningModule]) -> Iterator[None]:
    """Applies the plan of a checkpoint before ``on_load_checkpoint`` of the class, and of its subclasses, is called.

    This is the only hook of Lightning between the constructor and the weights. A checkpoint of a ``LightningCLI`` names
    the subclass to build.
    """
    kinds = [kind for kind in _family(module_class) if kind is module_class or "on_load_checkpoint" in vars(kind)]
    own = {kind: vars(kind).get("on_load_checkpoint") for kind in kinds}
    for kind in kinds:
        kind.on_load_checkpoint = _after_replay(kind.on_load_checkpoint)
    try:
        yield
    finally:
        for kind, method in own.items():
            if method is None:
                del kind.on_load_checkpoint
            else:
                kind.on_load_checkpoint = method


def _family(kind: type[Any]) -> set[type[Any]]:
    return {kind, *(found for sub in kind.__subclasses__() for found in _family(sub))}


def _after_replay(method: Any) -> Any:
    @wraps(method)
    def restored(module: LightningModule, checkpoint: dict[str, Any]) -> None:
        record = Record.of(checkpoint)
        if record is not None and (record.plan is not None or record.lora is not None):
            ForeignTarget.of_record(module, record).replay(record)
        method(module, checkpoint)

    return restored
