"""The page of all classes is what the command prints."""

import re
from pathlib import Path

import pytest

from hfprune.publishing.survey import UNITS, classes, survey
from hfprune.publishing.survey_table import survey_page

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ROW = re.compile(r"^\| (\w+) \|((?: (?:yes|no|per layer|-) \|){6}) (?:table|derived) \|$", re.MULTILINE)


def verdicts(page):
    """Returns class name -> its marks, and the classes that are refused as a whole."""
    marks = {name: tuple(cell.strip() for cell in cells.split("|")[:-1]) for name, cells in ROW.findall(page)}
    refused = re.findall(r"^\| (\w+) \| ", page.partition("## Classes that are refused")[2], re.MULTILINE)
    return marks, {name for name in refused if name != "class"}


def test_counts_of_the_page_are_those_of_its_table():
    page = PAGE.read_text(encoding="utf-8")
    marks, refused = verdicts(page)
    assert not marks.keys() & refused
    total, proven, part, none = map(
        int, re.search(r"Of (\d+) classes (\d+) .* (\d+) in part, and (\d+) ", page).groups()
    )
    assert (total, none) == (len(marks) + len(refused), len(refused))
    assert proven + part == len(marks)
    for place, kind in enumerate(UNITS):
        named = {"mlp": "neurons"}.get(kind, kind)
        number = sum(cells[place] in ("yes", "per layer") for cells in marks.values())
        assert f"{named} {number}" in page
    for place, least in ((0, 45), (1, 30), (3, 35)):  # MLP neurons, heads, layers
        assert sum(cells[place] in ("yes", "per layer") for cells in marks.values()) >= least


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_page_is_what_the_command_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path))
    rows = sorted(survey(jobs=2, time_limit=600), key=lambda row: row.model_class)
    assert len(rows) == len(classes())
    assert verdicts(survey_page(rows)) == verdicts(PAGE.read_text(encoding="utf-8"))
