"""``hfprune export``: a model that hfprune wrote, in another layout or in the format of an engine."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from hfprune.cli.base import BaseCLI
from hfprune.io.gguf import check_gguf, check_gguf_target, export_gguf
from hfprune.io.layouts import LAYOUTS
from hfprune.io.load import previous_plan
from hfprune.io.loading import LoadingOptions
from hfprune.io.output_folder import check_apart, check_replaceable
from hfprune.io.save import check_writable, export_facts, export_model, saved_line
from hfprune.models import mlp_widths
from hfprune.plan import PruningPlan
from hfprune.publishing.engine_check import SCRIPTS, check_engine
from hfprune.publishing.engine_rules import ENGINES, engine_line, facts_of, verdict
from hfprune.publishing.engines import gguf_lines
from hfprune.publishing.inspection import inspect_folder
from hfprune.utils.errors import ConfigError

FORMATS = ("gguf",)
"""Values of ``--to`` other than layouts: formats that hfprune writes and does not read."""


def add_layout_argument(parser: LightningArgumentParser) -> None:
    """Adds ``--layout``."""
    parser.add_argument(
        "--layout",
        type=str,
        default="uniform",
        help="how the model is written: uniform (loads anywhere; the same number of units in every layer), per_layer "
        "(loads with hfprune), padded (loads anywhere; narrower layers are padded with zeros), bitmask (only "
        "with export; loads with hfprune; zeros of sparse models take no space), nemotron_nas (only with export; Llama "
        "in vLLM and others; widths are multiples of 256)",
    )


_OPTIONS = ("config", "output_dir", "overwrite", "layout", "to", "gguf_type", "check")
_MODEL_OPTIONS = ("model", "model.path", *(f"model.{option.name}" for option in fields(LoadingOptions)))


class ExportCLI(BaseCLI):
    """Command ``export``."""

    @classmethod
    def uses(cls, flag: str) -> bool:
        """Returns whether export reads a flag: the model, the format and the output; no data and no trainer."""
        return flag in (*_OPTIONS, *_MODEL_OPTIONS)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the format and the output; the model is a pruned one."""
        parser.add_argument(
            "--output_dir", type=str, required=True, help="receives config, weights, tokenizer, plan; a file for gguf"
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="replace what is there")
        add_layout_argument(parser)
        parser.add_argument(
            "--to",
            type=str | None,
            default=None,
            help="format: a layout, as --layout, or gguf (one file for llama.cpp; --output_dir is its name)",
        )
        parser.add_argument(
            "--gguf_type",
            type=str,
            default="auto",
            help="type of the matrices of a GGUF file: f32, f16, bf16, q8_0, q4_0, or auto (bf16 or f16)",
        )
        parser.add_argument(
            "--check",
            type=str | None,
            default=None,
            help=f"engine in which the result is loaded and compared: {', '.join(SCRIPTS)}; for "
            f"{', '.join(sorted(ENGINES.keys() - SCRIPTS))} the known rules are checked",
        )
        parser.set_defaults({"model.allow_pruned": True})

    def run(self) -> None:
        """Runs the command."""
        chosen = self._format()
        target = Path(self.config.output_dir)
        if chosen == "gguf":
            self._write_gguf(target)
        else:
            self._write_folder(target, chosen)

    def _format(self) -> str:
        """Returns the layout, or the format of an engine."""
        to: str | None = self.config.to
        if to is not None and self.given.get("layout") not in (None, to):
            raise ConfigError(f"to='{to}' and layout='{self.config.layout}' are two formats: give one.")
        if to is not None and to not in FORMATS and to not in LAYOUTS:
            raise ConfigError(f"to='{to}' is not known. Known: {', '.join((*LAYOUTS, *FORMATS))}.")
        if to != "gguf" and self.given.get("gguf_type") is not None:
            raise ConfigError(f"gguf_type='{self.config.gguf_type}' is the type of a GGUF file: give to='gguf'.")
        if to == "gguf" and self.config.check is not None:
            raise ConfigError(f"check='{self.config.check}' loads a folder, and to='gguf' writes a file: leave it out.")
        return to or str(self.config.layout)

    def _write_folder(self, target: Path, layout: str) -> None:
        module = self.model
        plan = previous_plan(module.path, loading=module.loading)
        if plan is None:
            raise ConfigError(f"--model.path '{module.path}' has no plan.json: hfprune did not write this model.")
        check_apart(target, {"model.path": module.path}, names=None)
        module.check_loadable()
        LAYOUTS.get(layout).check(module.meta_model())
        self._check_rules(layout)
        check_replaceable(target, overwrite=self.config.overwrite, argument="output_dir")
        check_writable(target.absolute().parent, "output_dir", name=target)
        module.configure_model()
        settings = {"layout": layout, "overwrite": self.config.overwrite}
        saved = export_model(module.causal_lm, module.tokenizer, PruningPlan.load(plan), target, **settings)
        Console().print(saved_line(target, saved), soft_wrap=True)
        self.result = {"output_dir": str(target), **saved, **self._engines(target)}

    def _write_gguf(self, target: Path) -> None:
        """Writes one file, of a pruned model or of a dense one to compare with."""
        module, kind, overwrite = self.model, self.config.gguf_type, self.config.overwrite
        check_gguf_target(target, overwrite=overwrite, argument="output_dir")
        check_apart(target, {"model.path": module.path}, names=None)
        check_writable(target.absolute().parent, "output_dir", name=target)
        module.check_loadable()
        check_gguf(module.meta_model(), tokenizer=module.tokenizer, gguf_type=kind)
        module.configure_model()
        plan = previous_plan(module.path, loading=module.loading)
        known = {} if plan is None else export_facts(PruningPlan.load(plan))
        facts = {name.removeprefix("hfprune_"): text for name, text in known.items()}
        saved = export_gguf(
            module.causal_lm, module.tokenizer, target, gguf_type=kind, overwrite=overwrite, facts=facts
        )
        for line in gguf_lines(target, saved):
            Console().print(line, soft_wrap=True)
        self.result = {"output": str(target), "to": "gguf", **saved}

    def _check_rules(self, layout: str) -> None:
        """Raises ``ConfigError`` if the rules of the engine refuse the result; layers are padded later."""
        engine: str | None = self.config.check
        if engine is None:
            return
        if engine not in ENGINES:
            raise ConfigError(f"check='{engine}' is not known. Known: {', '.join(ENGINES)}.")
        model: Any = self.model.meta_model()
        known = {**model.config.to_dict(), "architectures": [type(model).__name__], "auto_map": True}
        state, note = verdict(engine, facts_of(known, mlp_widths(model), layout=layout))
        if state == "refused" and layout != "padded":
            raise ConfigError(
                f"check='{engine}': {ENGINES[engine].title} does not load layout='{layout}' here: {note}."
            )

    def _engines(self, target: Path) -> dict[str, Any]:
        """Prints which engines load the result, and loads it in one of them."""
        found, engine = inspect_folder(str(target))["engines"], self.config.check
        Console().print(f"It {engine_line(found)}.", soft_wrap=True, highlight=False)
        if engine is None:
            return {"engines": found}
        if engine not in SCRIPTS:
            entry = found[engine]
            Console().print(f"{entry['engine']} was not run: by its rules, {entry['state']}. {entry['note']}".strip())
            return {"engines": found}
        checked = check_engine(target, self.model.causal_lm, engine, tokenizer=self.model.tokenizer)
        Console().print(str(checked), soft_wrap=True, highlight=False)
        return {"engines": found, "check": asdict(checked)}
