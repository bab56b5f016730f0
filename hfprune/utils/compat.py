"""Private APIs of other libraries, one function each, so that a release which changes one breaks a single place.

Each function names the releases it was tested with and why the public API is not enough.
``tests/unit/utils/test_compat.py`` has one test per function.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def cached_file_or_none(path: str, file: str, **hub: Any) -> Path | None:
    """Returns a file of a model folder or hub id, or None if the model has no such file.

    transformers 5.20 to 5.23: ``cached_file(_raise_exceptions_for_missing_entries=False)``. The public call raises
    the same ``OSError`` for a missing file and for a repository that cannot be reached; without the private argument an
    unreachable hub would look like a model without the file.

    Args:
        path: The folder or hub id.
        file: Name of the file.
        hub: Arguments of ``from_pretrained`` about the hub: ``revision``, ``token``, ``cache_dir`` and others.
    """
    from transformers.utils.hub import cached_file

    found = cached_file(path, file, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def attention_implementation(config: Any) -> str:
    """Returns the attention implementation that a model with ``config`` runs: ``eager``, ``sdpa``, ...

    transformers 5.20 to 5.23: ``config._attn_implementation``. The public ``attn_implementation`` is an argument of
    ``from_pretrained``, not an attribute. Without the private one, packed documents could not be separated safely.

    Args:
        config: A Hugging Face config.
    """
    return str(getattr(config, "_attn_implementation", None) or "eager")


def causal_lm_classes() -> dict[str, str]:
    """Returns model type -> name of the class that ``AutoModelForCausalLM`` builds, for every known model type.

    transformers 5.20 to 5.23: ``modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``. No public function lists
    the classes.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {str(kind): str(name) for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def causal_lm_class(config: Any) -> Any:
    """Returns the class that ``AutoModelForCausalLM`` builds for a config.

    transformers 5.20 to 5.23: ``AutoModelForCausalLM._model_mapping``. The public ``from_config`` builds a model.

    Args:
        config: A Hugging Face config.

    Raises:
        KeyError: The config class has no causal LM.
    """
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def default_config(model_type: str) -> Any:
    """Returns the default config of a model type, as a decoder.

    transformers 5.20 to 5.23: classes of encoders (BERT) are causal with ``is_decoder`` only, and X-MOD needs a
    language.

    Args:
        model_type: A key of :func:`causal_lm_classes`.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.for_model(model_type)
    switches = {"is_decoder": True, "default_language": "en_XX"}
    return type(config)(**{key: value for key, value in switches.items() if hasattr(config, key)})


@contextmanager
def safetensors_metadata(facts: Mapping[str, str]) -> Iterator[None]:
    """Adds entries to the metadata of the safetensors files that ``save_pretrained`` writes inside the block.

    transformers 5.20 to 5.23: ``transformers.modeling_utils.safe_save_file``. ``save_pretrained`` has no argument for
    metadata; without the private name every file would be written twice.

    Args:
        facts: Name -> text.
    """
    from transformers import modeling_utils

    original: Any = modeling_utils.safe_save_file  # type: ignore[attr-defined]

    def save(tensors: Any, filename: Any, metadata: Any = None) -> Any:
        return original(tensors, filename, metadata={**(metadata or {}), **facts})

    modeling_utils.safe_save_file = save  # type: ignore[attr-defined]
    try:
        yield
    finally:
        modeling_utils.safe_save_file = original  # type: ignore[attr-defined]


def is_repo_id(text: str) -> bool:
    """Returns whether a text has the form of a hub id: ``name`` or ``owner/name``.

    huggingface_hub 1.31 to 2.4: ``huggingface_hub.utils.validate_repo_id``, which is not documented. Without it, a
    misspelled folder would be looked up on the hub.

    Args:
        text: The text.
    """
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    try:
        utils.validate_repo_id(text)  # type: ignore[attr-defined]
    except HFValidationError:
        return False
    return True


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of the storages that operators allocate, until they are freed.

    torch 2.6 to 2.13: ``torch.utils._python_dispatch.TorchDispatchMode`` and ``torch.utils._pytree.tree_leaves``.
    torch has no public measure of peak memory on the CPU.

    Args:
        known: Existing tensors, which are not counted.

    Attributes:
        peak: Largest number of bytes allocated at the same time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it returns."""
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def parser_actions(parser: Any) -> list[Any]:
    """Returns the actions (options) of an ``argparse`` parser.

    ``argparse`` lists them in the private ``ArgumentParser._actions`` only (Python 3.11 to 3.14; jsonargparse 4.40 to
    4.53 adds its own there). Without it, misspelled flags would get no suggestion and messages no flag.

    Args:
        parser: An ``argparse.ArgumentParser``, or a subclass such as jsonargparse's or Lightning's.
    """
    return list(parser._actions)


def type_hint(action: Any) -> Any:
    """Returns the type that an action of a jsonargparse parser takes; None for one without a type.

    jsonargparse 4.40 to 4.53: ``ActionTypeHint._typehint``. The public ``action.type`` is None if a type has
    options of its own. Without it, the table of flags would have no types.

    Args:
        action: An action of :func:`parser_actions`.
    """
    return getattr(action, "_typehint", None)


def instantiate(parser: Any, config: Any) -> Any:
    """Returns a configuration with the classes that it names instantiated.

    jsonargparse 4.49 renamed ``instantiate_classes`` to ``instantiate``, and 5.0 removes the old name.

    Args:
        parser: A jsonargparse parser.
        config: The namespace that the parser returned.
    """
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)


# ---- Lightning: the objects are arguments, because this room does not import it --------------------------------------


def resolved_checkpoint(trainer: Any, path: Any, state: Any) -> Any:
    """Returns the path of a checkpoint that a keyword such as ``last`` names.

    Lightning 2.6: ``_CheckpointConnector._parse_ckpt_path``. The public ``trainer.ckpt_path`` has the keyword until
    weights are restored, which is after the strategy is set up.

    Args:
        trainer: The trainer.
        path: A path or keyword.
        state: ``TrainerFn.FITTING``, or another state.
    """
    connector = trainer._checkpoint_connector
    return connector._parse_ckpt_path(state, path, model_provided=True, model_connected=True)


def training_source(trainer: Any) -> Any:
    """Returns the source of the training loader, with ``is_defined()`` and ``dataloader()``, before it is loaded.

    Lightning 2.6: ``_FitLoop._data_source``. The public ``trainer.train_dataloader`` is None until the fit loop starts,
    and has a distributed sampler afterwards.

    Args:
        trainer: The trainer, with its module and data attached.
    """
    return trainer.fit_loop._data_source


def saves_shards(strategy: Any) -> bool:
    """Returns whether a ``ModelParallelStrategy`` saves a folder of shards.

    Lightning 2.6: ``ModelParallelStrategy._save_distributed_checkpoint``, which holds its public constructor argument.

    Args:
        strategy: The strategy.
    """
    return bool(strategy._save_distributed_checkpoint)


def within_step(trainer: Any) -> bool:
    """Returns whether gradients are accumulated: the last batch did not end an optimizer step.

    Lightning 2.6: ``_TrainingEpochLoop._should_accumulate``. No public attribute says so for the last batches of an
    epoch.

    Args:
        trainer: The trainer, in ``fit``.
    """
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


@contextmanager
def saved_hyperparameters(own: Mapping[str, Any], *, without: Iterable[str]) -> Iterator[None]:
    """Context in which ``save_hyperparameters()`` stores given values in place of the constructor's local variables.

    Lightning 2.6: ``hparams_mixin._given_hyperparameters``, with which ``LightningCLI`` passes the values of a command
    line. The public method reads every parameter of the signature from the frame of the constructor, which a flat
    signature does not have.

    Args:
        own: Name -> value, unless a command line has given the values.
        without: Names that are not stored.
    """
    from lightning.pytorch.core.mixins import hparams_mixin

    given = hparams_mixin._given_hyperparameters.get()
    hidden = set(without)
    values = {name: value for name, value in (given or own).items() if name not in hidden}
    token = hparams_mixin._given_hyperparameters.set(values)
    try:
        yield
    finally:
        hparams_mixin._given_hyperparameters.reset(token)


def has_trainer(module: Any) -> bool:
    """Returns whether a LightningModule is attached to a trainer.

    Lightning 2.6: ``LightningModule._trainer``. The public ``module.trainer`` raises without a trainer.

    Args:
        module: The LightningModule.
    """
    return module._trainer is not None


def uncompiled(module: Any) -> Any:
    """Returns a module without the wrapper of ``torch.compile``.

    torch 2.6 to 2.13: ``OptimizedModule._orig_mod``. torch has no public way back.

    Args:
        module: A module, compiled or not.
    """
    return getattr(module, "_orig_mod", module)
