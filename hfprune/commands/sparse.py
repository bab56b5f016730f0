"""``fit`` and ``prune`` with a sparse method: ``--method`` or ``--sparsity``, on the command line or in YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from hfprune.callbacks import ReportCallback, SparsityCallback
from hfprune.commands.precedence import config_files, read_config
from hfprune.commands.run import RunCLI
from hfprune.errors import ConfigError
from hfprune.files import tidy
from hfprune.outputs import CHECKPOINT_FOLDER, STATE_FOLDER
from hfprune.recovery import LoraRecovery
from hfprune.sparse import METHODS, SparseGPT, SparseMethod

FLAGS = ("method", "sparsity")


def asks_for(args: Sequence[str], flags: Sequence[str]) -> bool:
    """Returns whether flags of a kind are among ``args``, or in a YAML file that these name."""
    names = [arg.removeprefix("--").split("=")[0].split(".")[0] for arg in args if arg.startswith("--")]
    return any(name in flags for name in (*names, *(key for path in config_files(args) for key in read_config(path))))


class SparseCLI(RunCLI):
    """``fit`` and ``prune`` with a sparse method."""

    def classes(self) -> dict[str, type[Any]]:
        """Returns the classes that take the groups of options."""
        return super().classes() | {"sparse": SparsityCallback}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the method, the output folder and the sparsity callback."""
        parser.add_argument("--output_dir", type=str, required=True, help="receives model/, report.json, checkpoints/")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results of an earlier run")
        names = f"a name ({', '.join(METHODS)}), or a class of hfprune.sparse with options of its own"
        parser.add_argument("--method", type=SparseMethod | str, required=True, help=names)
        parser.add_argument(
            "--sparsity", type=str | float, required=True, help="share of zeros (0.5), or n zeros in every m (2:4)"
        )
        parser.add_argument(
            "--update", type=SparseGPT | str | None, default=None, help="sparsegpt: what stays makes up for what goes"
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from, or 'last': the newest"
        )
        parser.add_lightning_class_args(SparsityCallback, "sparse")
        for name in ("method", "sparsity", "update"):
            parser.link_arguments(name, f"sparse.{name}")
        parser.link_arguments("output_dir", "sparse.state_dir", compute_fn=_state_dir)
        parser.link_arguments(("overwrite", "ckpt_path"), "sparse.fresh", compute_fn=_fresh)
        parser.add_argument("--latency", type=bool, default=True, help="measure prefill and decode speed")
        if self.command == "fit":
            parser.set_defaults({"sparse.recovery": LoraRecovery()})
            self.add_fit_arguments(parser)

    def report(self, out: Path, *, overwrite: bool = False) -> ReportCallback:
        """Returns the report; a folder that holds nothing but finished layers is one to go on in."""
        config = self.config
        if not config.get("merge_adapters", True) and config.sparse.keep_zeros:
            raise ConfigError(
                "--merge_adapters false keeps adapters that would fill the zeros: give --sparse.keep_zeros false, or "
                "merge them."
            )
        tidy(out)
        going_on = out.is_dir() and {path.name for path in out.iterdir()} <= {STATE_FOLDER, CHECKPOINT_FOLDER}
        return super().report(out, overwrite=overwrite or going_on)


def _state_dir(output_dir: str) -> str:
    return str(Path(output_dir) / STATE_FOLDER)


def _fresh(overwrite: bool, ckpt_path: str | None) -> bool:
    """Returns whether finished layers are dropped: a run that is resumed goes on behind them."""
    return overwrite and ckpt_path is None
