"""``hfprune evaluate``, and the flags of zero-shot tasks."""

import logging
from pathlib import Path
from typing import cast

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.cli.base import BaseCLI
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.io.output_folder import ADAPTER_FOLDER, MODEL_FOLDER
from hfprune.trainer import PruneTrainer
from hfprune.utils.errors import ConfigError

_log = logging.getLogger(__name__)

_UNUSED = {
    "model": (
        "objective",
        "learning_rate",
        "weight_decay",
        "warmup_ratio",
        "distillation",
        "trainable",
        "optimizer",
        "gradient_checkpointing",
    ),
    "data": (
        "batch_size",
        "calibration_batch_size",
        "calibration_layout",
        "calibration_sequences",
        "num_workers",
        "overlong",
        "packing",
        "recovery_sequences",
        "self_text",
        "shuffle_buffer",
        "streaming",
        "token_cache",
        "validation_sequences",
    ),
}
"""Group -> options that concern calibration or training, which evaluate does not run."""
_OF_TRAINER = ("accelerator", "devices", "strategy")


class EvaluateCLI(BaseCLI):
    """Command ``evaluate``."""

    @classmethod
    def uses(cls, flag: str) -> bool:
        """Returns whether evaluate reads a flag: of the Trainer, only where the model runs."""
        group, _, name = flag.partition(".")
        if group == "trainer":
            return name in ("", *_OF_TRAINER)
        return name.partition(".")[0] not in _UNUSED.get(group, ())

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of ``PruneTrainer.evaluate`` and ``ZeroShotTasks``; the model may be a pruned one."""
        parser.add_argument("--dense", type=str | None, default=None, help="dense model to compare with")
        parser.add_argument(
            "--dense_revision", type=str | None, default=None, help="branch, tag or commit of the dense model's hub id"
        )
        parser.add_argument(
            "--dense_subfolder", type=str | None, default=None, help="folder of the dense model within --dense"
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Lightning checkpoint of --model.path to measure"
        )
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        parser.add_argument(
            "--dense_cache", type=str | None, default=None, help="folder that keeps the dense model's top logits"
        )
        parser.add_argument("--output", type=str | None, default=None, help="JSON file for the figures")
        add_task_arguments(parser)
        parser.set_defaults({"model.allow_pruned": True})

    def run(self) -> None:
        """Runs the command."""
        c = self.config
        if c.dense is None and (c.dense_revision is not None or c.dense_subfolder is not None):
            raise ConfigError("--dense_revision and --dense_subfolder belong to --dense, which is not given.")
        self.check_no_training()
        if (adapter := _kept_adapter(self.model.path)) is not None:
            _log.warning(
                "'%s' is measured without the recovery, which is in '%s': recover with --merge_adapters true to "
                "measure both, or see the figures of the recovered model in report.html.",
                self.model.path,
                adapter,
            )
        self.log_notes()
        stages = cast(PruneTrainer, self.trainer).evaluate(
            self.model,
            self.datamodule,
            dense=c.dense,
            dense_loading=self.model.loading.elsewhere(revision=c.dense_revision, subfolder=c.dense_subfolder),
            ckpt_path=c.ckpt_path,
            latency=c.latency,
            zero_shot=zero_shot_tasks(c),
            dense_cache=c.dense_cache,
            output=c.output,
        )
        self.result = {"stages": stages}


def _kept_adapter(path: str) -> Path | None:
    """Returns the adapter that a run kept apart from a model, or None."""
    adapter = Path(path).absolute().parent / ADAPTER_FOLDER
    apart = Path(path).name == MODEL_FOLDER and (adapter / "adapter_config.json").is_file()
    return adapter if apart else None


def add_task_arguments(parser: LightningArgumentParser) -> None:
    """Adds the flags of zero-shot tasks, named as lm-eval names them where it has them."""
    parser.add_argument(
        "--tasks",
        type=str | list[str] | None,
        default=None,
        help="lm-eval tasks, separated by commas; paper10, llmpruner7 and zpruner5 are the papers' lists",
    )
    parser.add_argument("--limit", type=int | None, default=None, help="number of items per task, the first ones")
    parser.add_argument(
        "--num_fewshot", type=int | None, default=None, help="examples in the prompt (default: each task's own number)"
    )
    parser.add_argument(
        "--task_data", type=str | None, default=None, help="folder of released data sets, for offline use"
    )
    parser.add_argument("--include_path", type=str | None, default=None, help="folder of your own task files")
    parser.add_argument("--task_batch_size", type=int, default=8, help="requests per forward pass")
    parser.add_argument(
        "--share_prefixes",
        type=bool | None,
        default=None,
        help="compute the shared prefix of answers once; false: lm-eval's own model class (default: share on the CPU)",
    )


def zero_shot_tasks(config: Namespace) -> ZeroShotTasks | None:
    """Returns the tasks that the flags ask for, None when they ask for none.

    Raises:
        ConfigError: A task flag was given without ``--tasks``, or its value cannot be used.
    """
    if config.tasks is None:
        for name in ("limit", "num_fewshot", "task_data", "include_path", "share_prefixes"):
            if config[name] is not None:
                raise ConfigError(f"--{name} belongs to zero-shot tasks: give --tasks, for example paper10.")
        return None
    listed = config.tasks if isinstance(config.tasks, list) else [config.tasks]
    names = [name.strip() for item in listed for name in item.split(",") if name.strip()]
    return ZeroShotTasks(
        names,
        data_dir=config.task_data,
        include_path=config.include_path,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        batch_size=config.task_batch_size,
        share_prefixes=config.share_prefixes,
    )
