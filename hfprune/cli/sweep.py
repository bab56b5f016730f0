"""``hfprune sweep``: a grid of methods, ratios and seeds in one table."""

import shlex
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from hfprune.cli.base import BaseCLI
from hfprune.cli.evaluate import add_task_arguments, zero_shot_tasks
from hfprune.data import TextDataModule
from hfprune.report.run_folder import recipe
from hfprune.report.table import show
from hfprune.sweep import Method, Sweep, SweepGrid
from hfprune.sweep.grid import default_methods
from hfprune.sweep.recommendation import RECIPE_FILE, Recipe
from hfprune.sweep.tables import markdown
from hfprune.utils.errors import ConfigError


class SweepCLI(BaseCLI):
    """Command ``sweep``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the grid, the output folder and the tasks."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives the tables; resumed if not empty")
        parser.add_argument(
            "--methods",
            type=list[Method] | None,
            default=None,
            help="methods to compare (default: entropy, cross_entropy, magnitude, random)",
        )
        parser.add_argument("--pruning_ratios", type=list[float], default=[0.2, 0.3], help="shares of ALL parameters")
        parser.add_argument("--seeds", type=list[int], default=[42], help="seeds of the calibration data")
        parser.add_argument(
            "--texts", type=dict[str, str] | None, default=None, help="name: evaluation text (default: --data.text)"
        )
        parser.add_argument(
            "--round_to",
            type=PositiveInt | Literal["auto"],
            default=1,
            help="kept widths are multiples of this, or auto",
        )
        parser.add_argument("--task_seeds", type=PositiveInt, default=1, help="seeds whose models run the tasks")
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        add_task_arguments(parser)

    def run(self) -> None:
        """Runs the command."""
        c, trainer = self.config, self.trainer
        self.check_no_training()
        self.log_notes()
        init = self.config_init
        texts = c.texts or ({"text": c.data.text} if c.data.text else {})
        if not texts or c.data.calibration in texts.values():
            raise ConfigError(
                'sweep evaluates on texts that do not calibrate: give --texts \'{"NAME": "FILE"}\', or --data.text.'
            )
        grid = SweepGrid(
            methods=init.methods or default_methods(),
            pruning_ratios=c.pruning_ratios,
            seeds=c.seeds,
            texts=texts,
            round_to=c.round_to,
            task_seeds=c.task_seeds,
        )
        sweep = Sweep(
            self.model,
            grid,
            self.make_data,
            c.output_dir,
            zero_shot=zero_shot_tasks(c),
            latency=c.latency,
            device=trainer.strategy.root_device,
            recipe=Recipe(config=self.recipe, command=_next_command(Path(c.output_dir))),
        )
        self.result = result = sweep.run()
        show(markdown(result))
        Console().print(f"Saved to {c.output_dir}", soft_wrap=True)

    def recipe(self, method: Method, ratio: float) -> str:
        """Returns the configuration of a ``fit`` by a method of this sweep, as YAML.

        Args:
            method: The method.
            ratio: Share of all parameters to remove.
        """
        dumped = self.dumped()
        given = next((found for found in dumped.get("methods") or () if found["name"] == method.name), None)
        if given is None:  # one of the defaults, which have no settings of their own
            given = {"criterion": type(method.scorer).__name__, "objective": method.objective}
        importance = {name: value for name, value in given.items() if name != "name"}
        data = {name: value for name, value in dumped["data"].items() if name != "text"}
        data["text"] = next(iter(dumped.get("texts", {}).values()), dumped["data"].get("text"))
        config = {"model": dumped["model"], "data": data, "pruning_ratio": ratio, "round_to": dumped.get("round_to")}
        config |= {name: importance.pop(name, None) for name in ("skip_layers", "only_layers")}
        return recipe(config | {"importance": importance})

    def make_data(self, seed: int, text: str | None) -> TextDataModule:
        """Returns the data module of ``--data`` for a seed and an evaluation text; None leaves evaluation out."""
        given = self.config.data.as_dict() | {"seed": seed, "text": text}
        return TextDataModule(**given | ({"eval_windows": 0} if text is None else {}))


def _next_command(out: Path) -> str:
    """Returns the command that prunes and recovers by the recommended method."""
    words = ["hfprune", "fit", "--config", str(out / RECIPE_FILE), "--output_dir", f"{out}-best"]
    return shlex.join([*words, "--data.recovery", "FILE"])
