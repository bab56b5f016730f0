"""Tables of a survey: text for the terminal, and the page of the documentation."""

from collections.abc import Sequence
from importlib.metadata import version

from hfprune.publishing.survey import UNITS, VERDICTS, Row, counts

_HEADS = {
    "mlp": "neurons",
    "heads": "heads",
    "experts": "experts",
    "layers": "layers",
    "channels": "channels",
}
_COMMAND = "hfprune inspect --all --markdown"


def survey_text(rows: Sequence[Row]) -> str:
    """Returns one line for each class, and the counts.

    Args:
        rows: Rows of a survey.

    >>> print(survey_text([Row(model_class="MyForCausalLM", model_type="my", reason="it needs pictures")]))
    MyForCausalLM  refused: it needs pictures
    1 class: 0 proven, 0 in part, 1 refused; 0 for neurons, 0 for heads, 0 for experts, 0 for layers, 0 for channels
    """
    widest = max((len(row.model_class) for row in rows), default=0)
    lines = [f"{row.model_class.ljust(widest)}  {_summary(row)}" for row in rows]
    return "\n".join([*lines, _counts(rows)])


def survey_page(rows: Sequence[Row]) -> str:
    """Returns the page of the documentation, in Markdown.

    Args:
        rows: Rows of a survey of all classes.
    """
    number = counts(rows)
    marks = ["| class | " + " | ".join(_HEADS[kind] for kind in UNITS) + " | packing | described by |"]
    marks.append("|---|" + "---|" * (len(UNITS) + 2))
    kept = [row for row in rows if row.verdict != "refused"]
    marks += [_mark_row(row) for row in sorted(kept, key=lambda row: (VERDICTS.index(row.verdict), row.model_class))]
    refused = [f"| {row.model_class} | {_cell(row.reason)} |" for row in rows if row.verdict == "refused"]
    reasons = [
        f"| {row.model_class} | {_HEADS[kind]} | {_cell(reason)} |"
        for row in sorted(kept, key=lambda row: row.model_class)
        for kind, reason in row.units.items()
        if reason
    ]
    text = _INTRODUCTION.format(
        command=_COMMAND,
        transformers=version("transformers"),
        total=len(rows),
        proven=number["proven"],
        part=number["in part"],
        refused=number["refused"],
        kinds=", ".join(f"{_HEADS[kind]} {number[kind]}" for kind in UNITS),
    )
    parts = [
        text,
        "\n".join(marks),
        "## Units that are refused",
        "\n".join(["| class | units | reason |", "|---|---|---|"]),
    ]
    parts[-1] += "\n" + "\n".join(reasons)
    parts += ["## Classes that are refused", "| class | reason |\n|---|---|\n" + "\n".join(refused)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Architectures

hfprune prunes a class of models if it can prove, on a tiny random model of the class and in float64, that removal
equals masking. The description of the class is a table of hfprune, or is derived from the class. Every class that
`AutoModelForCausalLM` of transformers {transformers} knows was tried with its default config:

```bash
{command}
```

Of {total} classes {proven} are proven (MLP neurons or experts, heads and layers), {part} in part, and {refused} are
refused. By unit kind: {kinds}.

- **yes**: pruned and masked models agree, and a stock config states the result: plain transformers loads it, with the
  same logits.
- **per layer**: pruned and masked models agree; no stock config states the result, which needs the layout `per_layer`.
- **no**: refused, with the reason in the second table. **-**: the class has no such units.
- **packing**: whether documents that share a row are kept apart.

`hfprune inspect MODEL` shows the result for your model and its config. It can differ, because a default config may lack
what a released model has."""


def _counts(rows: Sequence[Row]) -> str:
    number = counts(rows)
    verdicts = ", ".join(f"{number[verdict]} {verdict}" for verdict in VERDICTS)
    kinds = ", ".join(f"{number[kind]} for {_HEADS[kind]}" for kind in UNITS)
    return f"{len(rows)} {'class' if len(rows) == 1 else 'classes'}: {verdicts}; {kinds}"


def _summary(row: Row) -> str:
    if row.verdict == "refused":
        return f"refused: {row.reason}"
    yes = [_HEADS[kind] for kind in UNITS if row.removable(kind)]
    no = [f"no {_HEADS[kind]}: {reason}" for kind, reason in row.units.items() if reason]
    return f"{row.verdict} ({row.source}): {', '.join(yes)}" + "".join(f"\n    {text}" for text in no)


def _mark_row(row: Row) -> str:
    marks = " | ".join(_mark(row, kind) for kind in UNITS)
    return f"| {row.model_class} | {marks} | {'no' if row.claims.get('packing') else 'yes'} | {row.source} |"


def _mark(row: Row, kind: str) -> str:
    if kind not in row.units:
        return "-"
    if not row.removable(kind):
        return "no"
    return "per layer" if row.stated.get(kind) else "yes"


def _cell(text: str) -> str:
    """Returns text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "\\<")
