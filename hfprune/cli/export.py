"""``hfprune export``: a model that hfprune wrote, in another layout."""

from dataclasses import fields
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from hfprune.cli.base import BaseCLI
from hfprune.io.layouts import LAYOUTS
from hfprune.io.load import previous_plan
from hfprune.io.loading import LoadingOptions
from hfprune.io.output_folder import check_apart, check_replaceable
from hfprune.io.save import check_writable, export_model, saved_line
from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError


def add_layout_argument(parser: LightningArgumentParser) -> None:
    """Adds ``--layout``."""
    parser.add_argument(
        "--layout",
        type=str,
        default="uniform",
        help="how the model is written: uniform (loads anywhere; the same number of units in every layer), per_layer "
        "(loads with hfprune), padded (loads anywhere; narrower layers are padded with zeros), bitmask (only "
        "with export; loads with hfprune; zeros of sparse models take no space)",
    )


_OPTIONS = (
    *("config", "output_dir", "overwrite", "layout", "model", "model.path"),
    *(f"model.{option.name}" for option in fields(LoadingOptions)),
)


class ExportCLI(BaseCLI):
    """Command ``export``."""

    @classmethod
    def uses(cls, flag: str) -> bool:
        """Returns whether export reads a flag: the model, the layout and the folder; no data and no trainer."""
        return flag in _OPTIONS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the layout and the output folder; the model is a pruned one."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives config, weights, tokenizer, plan")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace what is there")
        add_layout_argument(parser)
        parser.set_defaults({"model.allow_pruned": True})

    def run(self) -> None:
        """Runs the command."""
        module, layout, target = self.model, self.config.layout, Path(self.config.output_dir)
        plan = previous_plan(module.path, loading=module.loading)
        if plan is None:
            raise ConfigError(f"--model.path '{module.path}' has no plan.json: hfprune did not write this model.")
        check_apart(target, {"model.path": module.path}, names=None)
        module.check_loadable()
        LAYOUTS.get(layout).check(module.meta_model())
        check_replaceable(target, overwrite=self.config.overwrite, argument="output_dir")
        check_writable(target.absolute().parent, "output_dir", name=target)
        module.configure_model()
        settings = {"layout": layout, "overwrite": self.config.overwrite}
        saved = export_model(module.causal_lm, module.tokenizer, PruningPlan.load(plan), target, **settings)
        Console().print(saved_line(target, saved), soft_wrap=True)
        self.result = {"output_dir": str(target), **saved}
