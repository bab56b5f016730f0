"""The documentation site: every page is in its navigation, and what pages state of the code and the results is true."""

import ast
import html
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

import hfprune
from hfprune.cli.commands import COMMANDS
from hfprune.utils import errors
from hfprune.utils.errors import HFPruneError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


class Loader(yaml.SafeLoader):
    """Reads ``mkdocs.yml``, whose tags name functions of MkDocs' own environment."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)  # noqa: S506  # a safe loader


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def pages_of(nav):
    for item in nav:
        for target in item.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages_of(SITE["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))


def test_fonts_are_not_fetched():
    assert SITE["theme"]["font"] is False


def test_every_public_name_is_in_the_api_page():
    found = re.findall(r"^::: hfprune\.(\w+)$", page("api.md"), re.M)
    assert sorted(found) == sorted(set(hfprune.__all__) - {"__version__"})


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(text):
    """Returns the numbers with a decimal point or a thousands separator in a text: measurements, not counts."""
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|```.*?```", "", text, flags=re.S)
    return set(re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+", text))


@pytest.mark.parametrize("name", ["choose.md", "prune-7b.md", "compare.md"])
def test_figures_are_those_of_the_results(name):
    missing = figures(page(name)) - figures(page("results.md"))
    assert figures(page(name))
    assert not missing


def test_figures_of_the_readme_are_those_of_the_results():
    readme = figures((ROOT / "README.md").read_text(encoding="utf-8")) - {"3.11"}
    assert readme
    assert not readme - figures(page("results.md")) - {"2.0"}


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw():
    return runpy.run_path(str(DOCS / "pictures/draw.py"))


def test_the_lifecycle_picture_is_that_of_the_script(draw):
    assert draw["lifecycle"]() == (DOCS / "pictures/lifecycle.svg").read_text(encoding="utf-8")


def test_plots_show_the_figures_of_the_results(draw):
    points = {name: (time, perplexity) for name, time, perplexity in draw["cost_points"]()}
    assert points["activation norm"] == (0.82, 72.1)
    assert points["entropy, least squares"] == pytest.approx((2.27 + 3.35, 63.0))
    lines = dict(draw["frontier_lines"]())
    assert lines["entropy (HFPrune)"] == [(0, 29.19), (20, 80.4), (30, 191.7)]
    assert lines["the same, widths by measured KL"] == [(0, 29.19), (20, 50.46), (30, 70.72)]


def test_the_terminal_session_shows_what_the_commands_printed():
    record = runpy.run_path(str(DOCS / "pictures/record.py"))
    session = json.loads((DOCS / "pictures/session.json").read_text(encoding="utf-8"))
    picture = (DOCS / "pictures/session.svg").read_text(encoding="utf-8")
    assert [entry["command"] for entry in session] == list(record["COMMANDS"])
    assert {entry["command"].split()[1] for entry in session} <= COMMANDS.keys()
    texts = html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", picture)))
    for entry in session:
        lines = [f"$ {entry['command']}", *record["shown"](entry["output"])]
        assert "".join("".join(lines).split()) in "".join(texts.split())
    assert set(re.findall(r"https?://[^\s\"')]+", picture)) == {"http://www.w3.org/2000/svg"}  # no font of another host


def test_lines_on_progress_are_counted():
    shown = runpy.run_path(str(DOCS / "pictures/record.py"))["shown"]
    lines = ["a ...", "a: step 1/2, 3 s left", "a: 5 s so far", "b", "b: 1 s left", "none left out"]
    assert shown(lines) == ["a ...", "[2 lines on progress]", "b", "b: 1 s left", "none left out"]


# ---- troubleshooting ---------------------------------------------------------------------------------------------------


def error_classes():
    found, todo = set(), [HFPruneError]
    while todo:
        for kind in todo.pop().__subclasses__():
            if kind.__module__.startswith("hfprune") and kind not in found:
                found.add(kind)
                todo.append(kind)
    return found


def messages():
    """Yields the quoted messages of the tables below the error classes."""
    for section in page("troubleshooting.md").split("\n## ")[1:]:
        if section.partition("\n")[0].endswith("Error"):
            for cell in re.findall(r"^\| (`[^|]*) \|", section, re.M):
                yield from re.findall(r"`([^`]+)`", cell)


def source_texts():
    """Returns the texts of the package: literals joined as Python joins them, a gap for every value."""
    texts = []
    for path in sorted((ROOT / "hfprune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return "\n".join(texts)


def test_every_error_class_is_explained():
    import hfprune.pruning.accumulator
    import hfprune.utils.files  # noqa: F401  # classes of their own

    public = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HFPruneError)}
    headings = re.findall(r"^## (\w+Error)$", page("troubleshooting.md"), re.M)
    assert set(headings) == public - {"HFPruneError"}
    assert not [kind.__name__ for kind in error_classes() if kind.__name__ not in page("troubleshooting.md")]


def not_in(sources, quoted):
    """Returns the quoted messages of which a part between ``...`` is in no text."""
    parts = [(text, part.strip(" '")) for text in quoted for part in text.split("...") if part.strip(" '.")]
    return [text for text, part in parts if part not in sources]


def test_quoted_messages_are_those_of_the_code():
    quoted = list(messages())
    assert len(quoted) > 30
    assert not not_in(source_texts(), quoted)


def test_a_message_that_the_code_lacks_is_found():
    sources = "The plan was made for \0, the model is \0."
    assert not_in(sources, ["The plan was made for ..., the model", "The plan was made of ..."]) == [
        "The plan was made of ..."
    ]
