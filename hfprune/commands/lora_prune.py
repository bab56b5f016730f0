"""``fit`` that prunes while adapters are trained: ``--lora_prune.*``, on the command line or in YAML."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from hfprune.callbacks import LoraPruneCallback
from hfprune.commands.export import add_layout_argument
from hfprune.commands.run import BUDGET, RunCLI

FLAGS = ("lora_prune",)


class LoraPruneCLI(RunCLI):
    """``fit`` with gradual pruning."""

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return super().classes() | {"lora_prune": LoraPruneCallback}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the budget, the output folder and the callback."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        parser.add_lightning_class_args(LoraPruneCallback, "lora_prune")
        for name in ("pruning_ratio", "target_params", "round_to"):
            kind, text = BUDGET[name]
            parser.add_argument(f"--{name}", type=kind | None, default=1 if name == "round_to" else None, help=text)
            parser.link_arguments(name, f"lora_prune.{name}")
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        add_layout_argument(parser)
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        self.add_fit_arguments(parser)
