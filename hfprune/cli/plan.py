"""Shows what pruning ratios mean for a model, from its shapes: no weight is read, nothing is written.

``hfprune plan MODEL --ratio 0.1 0.2 0.3``
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfprune.cli.loading_arguments import add_loading_arguments, loading_of
from hfprune.cli.recipes import default_round_to
from hfprune.cli.simple_commands import columns
from hfprune.cli.startup import importing
from hfprune.plan import SUBLAYERS, UNIT_KINDS
from hfprune.publishing.engine_rules import engine_line
from hfprune.publishing.engines import SERVING, serving_advice
from hfprune.utils.errors import ConfigError

if TYPE_CHECKING:
    from hfprune.publishing.forecast import Forecast

WORD_FLAG = "ratio"
"""The flag that a word after the model may belong to."""

_LABELS = {name: kind.label for name, kind in UNIT_KINDS.items()}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the dense model; config.json is enough")
    parser.add_argument(
        "--ratio",
        "--pruning_ratio",
        dest="pruning_ratio",
        type=_ratios,
        nargs="+",
        default=[[0.1, 0.2, 0.3]],
        metavar="R",
        help="shares of all parameters to remove (default: 0.1 0.2 0.3)",
    )
    kinds = f"units to remove, of {', '.join(_LABELS)} (default: mlp)"
    parser.add_argument("--units", nargs="+", choices=_LABELS, default=["mlp"], metavar="KIND", help=kinds)
    rounded = "kept widths are multiples of N, or auto: 256, 128 or 64 where it costs little (default: as prune does)"
    parser.add_argument("--round_to", type=_rounding, default=None, metavar="N", help=rounded)
    skipped = "layers and modules that are not pruned: 0,-1 or 0-3, '*.self_attn', re:REGEX"
    parser.add_argument("--skip_layers", default=None, metavar="P", help=skipped)
    only = "the only layers and modules that are pruned"
    parser.add_argument("--only_layers", default=None, metavar="P", help=only)
    parser.add_argument("--serve", choices=SERVING, default=None, help="how it will be served, which sets --round_to")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="length for MACs and cache")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_loading_arguments(parser)


def _ratios(word: str) -> list[float]:
    """Returns one share, or several separated by commas."""
    try:
        found = [float(part) for part in word.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{word}' is no share of all parameters, for example 0.2") from None
    if not all(0 < ratio < 1 for ratio in found):
        raise ArgumentTypeError(f"{word} is not between 0 and 1 (both excluded): it is a share of all parameters")
    return found


def _rounding(word: str) -> int | str:
    """Returns a number, or ``auto``."""
    if word != "auto" and not word.lstrip("-").isdigit():
        raise ArgumentTypeError(f"'{word}' is neither a number nor auto")
    return word if word == "auto" else int(word)


def run(arguments: Namespace) -> None:
    """Prints the forecast."""
    with importing():
        from hfprune.io.load import meta_model
        from hfprune.models.skip_layers import SkipLayers
        from hfprune.publishing.forecast import forecast, impossible_ratios
    if arguments.tokens < 1:
        raise ConfigError(f"tokens={arguments.tokens} is not positive.")
    model = meta_model(arguments.model, argument="model", loading=loading_of(arguments))
    round_to = arguments.round_to
    if round_to is None:
        round_to = SERVING.get(arguments.serve) or default_round_to(arguments.units)
    skip = SkipLayers.of(arguments.skip_layers, arguments.only_layers)
    settings: dict[str, Any] = {"units": arguments.units, "round_to": round_to, "skip_layers": skip}
    asked = [ratio for ratios in arguments.pruning_ratio for ratio in ratios]
    impossible = impossible_ratios(model, asked, **settings)
    ratios = [ratio for ratio in asked if ratio not in impossible]
    if not ratios:
        raise ConfigError(next(iter(impossible.values())))
    found = forecast(model, ratios, tokens=arguments.tokens, **settings)
    if arguments.json:
        plans = [entry.to_dict() for entry in found]
        print(json.dumps({"model": arguments.model, "plans": plans, "impossible": impossible}, indent=2))
        return
    print(_text(found))
    if arguments.serve:
        config: Any = model.config
        texts = [serving_advice(entry.widths, config.hidden_size, arguments.serve) for entry in found[1:]]
        print("\n".join(text.replace("round_to=", "--round_to ") for text in dict.fromkeys(filter(None, texts))))
    for reason in impossible.values():
        print(reason)


def _text(found: Sequence["Forecast"]) -> str:
    kinds = list(dict.fromkeys(kind for entry in found for kind in entry.kept))
    head = ["ratio", "parameters", "removed", *(_LABELS[kind] for kind in kinds), "GiB", "MACs/token", "KV cache MiB"]
    rows: list[list[str]] = [[*head, "multiple of", "GPUs"]]
    for entry in found:
        about = "~" if entry.provisional else ""
        rows.append(
            [
                f"{entry.pruning_ratio:g}" if entry.pruning_ratio else "dense",
                f"{about}{entry.parameters:,}",
                f"{entry.removed_share:.2%}" if entry.pruning_ratio else "",
                *(about + _units(entry, kind) for kind in kinds),
                f"{entry.weight_bytes / 2**30:.3f}",
                f"{entry.macs_per_token / 1e9:.3f} G",
                f"{entry.kv_cache_bytes / 2**20:.1f}",
                str(entry.multiple or "-"),
                ", ".join(map(str, [1, *entry.devices])),
            ]
        )
    return "\n".join([columns(rows), *_notes(found)])


def _units(entry: "Forecast", kind: str) -> str:
    kept = entry.kept.get(kind, [])
    if not kept:
        return ""
    if kind in SUBLAYERS:
        return f"{sum(kept):,}"
    text = f"{kept[0]:,}" if len(set(kept)) == 1 else f"{min(kept):,} to {max(kept):,}"
    exact = entry.exact_width
    return f"{text} (exact {exact:,.1f})" if kind == "mlp" and exact is not None and exact != kept[0] else text


def _notes(found: Sequence["Forecast"]) -> list[str]:
    tokens = found[0].tokens
    notes = [
        "",
        f"MACs: multiply-accumulates of a pass over {tokens} tokens, divided by {tokens}. KV cache: {tokens} tokens, "
        "batch 1.",
        "multiple of: largest power of two (up to 256) that divides every MLP width. GPUs: tensor-parallel splits.",
    ]
    if any(entry.provisional for entry in found):
        notes.append("~: which units each layer keeps follows from the scores; the parameters are close, not exact.")
    advice = dict.fromkeys(entry.advice for entry in found if entry.advice)
    notes += [text.replace("round_to=", "--round_to ") for text in advice]
    return [*notes, *dict.fromkeys(f"It {engine_line(entry.engines)}." for entry in found[1:])]
