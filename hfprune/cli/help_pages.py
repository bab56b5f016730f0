"""``hfprune COMMAND --help``: one screen of what most people need; ``--help-all`` lists every flag of the table."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from hfprune.cli.flags import Flag, flags_of, objectives, short_names
from hfprune.cli.methods import kind_of

_HELP = ("-h", "--help")
_HELP_ALL = ("--help-all", "--help_all")

_MODEL = ("MODEL, --model DIR_OR_ID", "model to prune: a folder, a hub id, or smollm2-135m (embedded)")
_OUT = ("-o, --output_dir DIR", "receives model/, report.html, report.json, plan.json")
_SHARED: tuple[tuple[str, str], ...] = (
    ("--overwrite", "replace the results of an earlier run"),
    ("-c, --config FILE_OR_NAME", "YAML file, or a config of the package ('hfprune --help' lists them); flags win"),
    ("--print_config", "print all settings as YAML, and stop"),
)
_BUDGET = (
    ("--ratio SHARE", "share of ALL parameters to remove (0.2); or --target_params, --intermediate_size"),
    ("--round_to N", "widths are multiples of N; auto: the largest of 256, 128, 64 that costs at most 3 %"),
    ("--serve gguf|vllm|int4", "how it will be served, which sets --round_to: 256, 64, 128"),
    ("--recipe fast|best|paper", "fast (default): activation norms + least squares, one width; best: widths by"),
    ("", "measured KL, loads with hfprune; paper: entropy, exact width"),
    ("--method NAME", "entropy, activation_norm, fisher, ...: remove units by this score alone"),
    ("--method NAME --sparsity 0.5", "wanda, sparsegpt, ria, ...: set single weights to zero (0.5, or 2:4)"),
    ("--importance.units KINDS", "mlp (default), heads, experts, layers, channels; whole attentions and MLPs:"),
    ("", "attention_sublayers, mlp_sublayers; several: mlp,heads"),
    ("--importance.criterion NAME", "scores by name, or my_project.MyCriterion of the current folder"),
    ("--importance.compensation NAME", "least_squares: fit the kept weights to the dense model; null: leave them"),
    ("--importance.allocation NAME", "uniform, sensitivity, global_rank, ...: widths per layer"),
    ("--skip_layers 0-3,-1", "layers and modules that are not pruned, also '*.self_attn'; or --only_layers"),
    ("--data FILE", "calibration text: .txt, .jsonl, .parquet, hub id (default: Python's documentation)"),
    ("--data.calibration_sequences N", "number of calibration sequences (128), of --data.seq_len tokens (512)"),
    ("--data.text FILE", "evaluation text (default: held-out documents)"),
    ("--layout NAME", "uniform (loads anywhere), per_layer, padded"),
    ("--ckpt_path last", "continue an interrupted run"),
)
_RECOVERY = (
    ("--data.recovery FILE", "training text of the recovery (default: the calibration source)"),
    ("--trainer.max_epochs N", "epochs of recovery (1); --trainer.max_steps, --trainer.max_time limit it as well"),
    ("--importance.recovery MODE", "lora (default), full, mlp, none; --importance.recovery.rank 32"),
    ("--model.learning_rate X", "peak learning rate (4e-4)"),
    ("--model.distillation.alpha 1.0", "recover towards the dense model's predictions"),
    ("--lora_prune.every N", "prune gradually while LoRA adapters train, in place of one cut"),
)
_TASKS = (
    ("--tasks NAMES", "zero-shot tasks of lm-eval, separated by commas; paper10 and others are lists"),
    ("--task_data DIR", "folder of released data sets, for offline use; --limit N takes the first items"),
    ("--latency false", "do not measure speed"),
)
PAGES: dict[str, tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "prune": (
        "MODEL --ratio 0.2 -o OUT",
        (_MODEL, _OUT, *_BUDGET, *_SHARED),
        ("MODEL --ratio 0.2 --data C4.jsonl -o OUT", "MODEL --method wanda --sparsity 0.5 --data C4.jsonl -o OUT"),
    ),
    "fit": (
        "MODEL --ratio 0.2 --data.recovery FILE -o OUT",
        (_MODEL, _OUT, *_BUDGET, *_RECOVERY, *_SHARED),
        ("MODEL --ratio 0.2 --data.recovery ALPACA.json -o OUT", "-c quickstart -o OUT"),
    ),
    "evaluate": (
        "MODEL [--dense DENSE_MODEL]",
        (
            ("MODEL, --model DIR_OR_ID", "model to measure; the output folder of a run is its model"),
            ("--dense DIR_OR_ID", "dense model to compare with: adds KL, agreement and relative speed"),
            ("--data FILE", "evaluation text (--data.text)"),
            ("--data.eval_windows N", "evaluation windows (40), of --data.eval_window tokens (512); null: all"),
            *_TASKS,
            ("--dense_cache DIR", "keeps the dense model's top logits for later comparisons"),
            ("--ckpt_path FILE", "Lightning checkpoint of MODEL to measure"),
            ("-o, --output FILE", "JSON file for the figures"),
            *_SHARED[1:],
        ),
        ("OUT --dense DIR_OR_ID --data TEXT.txt -o figures.json", "OUT --tasks arc_easy,piqa --task_data DIR"),
    ),
    "sweep": (
        "MODEL --methods NAMES --data.text FILE -o OUT",
        (
            ("MODEL, --model DIR_OR_ID", "model to prune"),
            ("-o, --output_dir DIR", "receives the tables; the same command continues an interrupted sweep"),
            ("--methods NAMES", "entropy,fisher,wanda or recipes: fast,best; options of their own: in a config"),
            ("--ratios SHARES", "shares of ALL parameters to remove: 0.2,0.3"),
            ("--seeds NUMBERS", "seeds of the calibration data: 42,43"),
            ("--data FILE", "calibration text"),
            ("--data.text FILE", 'evaluation text; several: --texts \'{"NAME": "FILE"}\''),
            ("--round_to N", "widths are multiples of N"),
            *_TASKS,
            *_SHARED[1:],
        ),
        ("MODEL --methods entropy,wanda --ratios 0.2 --data C4.jsonl --data.text TEXT.txt -o OUT",),
    ),
    "export": (
        "MODEL --to FORMAT -o OUT",
        (
            ("MODEL, --model DIR", "model that hfprune wrote, or the output folder of a run"),
            ("--to NAME", "uniform, per_layer, padded, bitmask, nemotron_nas, or gguf: one file for llama.cpp"),
            ("--gguf_type TYPE", "type of a GGUF file's matrices: f32, f16, bf16, q8_0, q4_0, auto"),
            ("--check ENGINE", "load the result in an engine and compare tokens: vllm, transformers, ..."),
            ("-o, --output_dir DIR", "receives config, weights, tokenizer, plan; for gguf: the file"),
            ("--model.dtype TYPE", "type of the weights: auto, bfloat16, ..."),
            *_SHARED,
        ),
        ("OUT --to padded -o PADDED", "OUT --to gguf --gguf_type q8_0 -o model.gguf"),
    ),
}
"""Command -> usage, flags with their texts, and examples."""


def help_text(command: str, args: Sequence[str]) -> str | None:
    """Returns the help that a command line asks for, None if it asks for none that the table can give.

    Args:
        command: Name of the command.
        args: The command line without the command.
    """
    flags = flags_of(command)
    if not flags:
        return None
    if any(arg in _HELP_ALL for arg in args):
        return "\n".join(_everything(command, flags))
    if any(arg in _HELP for arg in args):
        return "\n".join(_screen(command))
    for arg, following in zip_longest(args, args[1:], fillvalue="-"):
        name = arg.removeprefix("--").removesuffix(".help")
        if arg.startswith("--") and arg.endswith(".help") and name in flags and following.startswith("-"):
            return "\n".join(_of_flag(command, flags[name], flags))
    return None


def _screen(command: str) -> Iterator[str]:
    from hfprune.cli.commands import COMMANDS

    usage, rows, examples = PAGES[command]
    yield f"usage: hfprune {command} {usage} [flags]"
    yield f"  {COMMANDS[command]}"
    yield ""
    width = max(len(name) for name, _ in rows) + 2
    yield from (f"  {name:<{width}}{text}" for name, text in rows)
    yield ""
    yield from (f"  hfprune {command} {example}" for example in examples)
    yield f"All flags: hfprune {command} --help-all. Those of one group: hfprune {command} --model.help"


def _everything(command: str, flags: dict[str, Flag]) -> Iterator[str]:
    yield from _screen(command)
    group = ""
    for flag in flags.values():
        owner = flag.name.partition(".")[0] if "." in flag.name or flag.form == "group" else ""
        if owner != group or flag is next(iter(flags.values())):
            yield ""
            yield f"{owner or 'other'}:" if owner != "" else "flags of the command:"
            group = owner
        if flag.form != "group":
            yield from _row(flag)


def _of_flag(command: str, flag: Flag, flags: dict[str, Flag]) -> Iterator[str]:
    """Yields the flags of a group, or what a flag that takes a class can be."""
    if flag.form == "group":
        yield f"hfprune {command}, flags of --{flag.name}:"
        for other in flags.values():
            if other.name.startswith(f"{flag.name}.") and other.form != "group":
                yield from _row(other)
        return
    yield from _row(flag)
    names = short_names().get(kind_of(flag.name) or "", {})
    if names:
        yield from textwrap.wrap(f"Names: {', '.join(names)}.", 100, initial_indent="  ", subsequent_indent="  ")
        yield f"  Options of one: --{flag.name}.help {next(iter(names))}"
    elif flag.name.endswith("objective"):
        yield f"  Names: {', '.join(objectives())}."


def _row(flag: Flag) -> Iterator[str]:
    default = f" (default: {flag.default})" if flag.default else ""
    required = " (required)" if flag.required else ""
    yield f"  --{flag.name} {flag.type}{required}{default}"
    yield from textwrap.wrap(flag.help, 100, initial_indent="      ", subsequent_indent="      ")
