"""The page of a report and its table, in a browser and on the terminal."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from hfprune import evaluation
from hfprune.report import (
    ReportData,
    TextTable,
    figures,
    read_run,
    render,
    write_report,
)
from hfprune.report.table import notes, show, stage_table, summary, to_markdown
from tests.helpers.reports import Page, full, full_page, stage

NAMES = ["frontier", "importance_heat_map", "kept_share", "convergence", "kl_by_position", "zero_shot"]
HEADINGS = ["Warnings", "Summary", "Figures", "Models", "Sample generations", "Commands", "Facts"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_every_section_of_full_data():
    page = Page(full_page())
    assert page.open == []
    assert page.text["h2"] == HEADINGS
    assert page.text["title"] == ["A run & its <title>"]
    assert [attrs["id"] for attrs in page.of("figure")] == [f"figure-{name}" for name in NAMES]
    assert all(attrs["alt"] for attrs in page.of("img"))
    assert len(page.of("figcaption")) == len(NAMES)
    assert all(attrs.get("scope") in ("row", "col", "rowgroup") for attrs in page.of("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"][1:] for attrs in page.of("a")} <= set(ids)


def test_user_text_is_escaped():
    page = Page(full_page())
    assert not page.of("script")
    assert not page.of("b")
    assert "<script>alert(1)</script>" in page.text["p"]
    assert "PERPLEXITY EXPLODED: <look>" in page.text["li"]
    words = full().commands[0].split()
    assert page.text["span"][-len(words) :] == words


def test_nothing_is_loaded_from_elsewhere():
    text = full_page()
    page = Page(text)
    links = {"src", "srcset", "href", "data", "action", "poster", "background", "style"}
    for tag, attrs in page.tags:
        for name in links & attrs.keys():
            assert attrs[name].startswith(("data:", "#")), (tag, name, attrs[name][:80])
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_sections_without_data_are_absent():
    page = Page(render(ReportData(title="Nothing")))
    assert not page.text.get("h2")
    assert not any(page.of(tag) for tag in ("figure", "table", "pre", "article", "li"))
    page = Page(render(ReportData(title="Sizes", stages={"dense": {"parameters": 5}})))
    assert page.text["h2"] == ["Summary"]
    assert page.text["td"] == ["", "5"]
    one = full(importance={}, convergence=(), frontier=(), generations=(), commands=(), warnings=["one"])
    page = Page(render(one))
    assert page.text["h2"] == ["Warning", "Summary", "Figures", "Facts"]
    assert list(figures(one)) == ["kept_share", "kl_by_position", "zero_shot"]


def test_summary_numbers_and_changes():
    rows = {label: cells for section in summary(full()) for label, cells in section.rows}
    assert [cell.text for cell in rows["Parameters"]] == ["134,515,008", "107,612,006", "107,612,006"]
    assert [cell.change for cell in rows["Parameters"]] == ["", "\u00d70.80", "\u00d70.80"]
    assert [cell.text for cell in rows["Perplexity"]] == ["19.40", "29.19", "22.80"]
    assert rows["KL to dense (nats/token)"][1].spread == "± 0.0330"
    assert rows["Top-1 agreement"][1].text == "67.0 %"
    assert rows["harder (acc_norm)"][1].change == "\u22125.0 points"
    assert rows["Prefill (ms)"][0].spread == "122.3 to 149.5"
    assert rows["Size of the weights"][0].text == "256.6 MiB"


def test_speeds_are_compared_only_where_they_were_measured_in_alternation():
    """Two moments of a busy machine say nothing of two models."""
    data = full()
    rows = {label: cells for section in summary(data) for label, cells in section.rows}
    assert {cell.change for name in ("Prefill (ms)", "Decoding (tokens/s)") for cell in rows[name]} == {""}
    assert any("separate moments and are not compared" in note for note in notes(data))
    latency = data.stages["pruned"]["latency"] | {"prefill_ratio": 0.8, "decode_ratio": 0.5}
    stages = dict(data.stages) | {"pruned": dict(data.stages["pruned"]) | {"latency": latency}}
    turned = dataclasses.replace(data, stages=stages)
    rows = {label: cells for section in summary(turned) for label, cells in section.rows}
    assert rows["Prefill (ms)"][1].change == "\u00d70.80"
    assert rows["Decoding (tokens/s)"][1].change == "\u00d72.00"
    assert any("in alternation with the dense model" in note for note in notes(turned))


def test_compensation_is_a_fact_and_a_note(tmp_path):
    report = {"plan": {"compensation": {"name": "LeastSquares", "damping": 0.1}}, "stages": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    data = read_run(tmp_path)
    assert data.facts["Compensation"] == "name LeastSquares, damping 0.1"
    assert any("LeastSquares" in note for note in notes(data))


@pytest.mark.parametrize(
    ("value", "expected"), [(math.inf, "infinite"), (math.nan, "NaN"), ("inf", "infinite"), (1e30, "1.00e+30")]
)
def test_perplexities_that_are_not_numbers(value, expected):
    stages = {"dense": stage(9_000_000, 19.4, 0.0, 0.4), "pruned": stage(8_000_000, value, 0.2, 0.3)}
    data = full(stages=stages)
    page = Page(render(data))
    assert any(text.strip() == expected for text in page.text["td"])
    rows = {label: cells for section in summary(data) for label, cells in section.rows}
    assert rows["Perplexity"][1].alarming == (value != 1e30)


def browse(path, profile, *flags):
    command = [BROWSER, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0", *flags]
    if os.geteuid() == 0:
        command.append("--no-sandbox")
    return subprocess.run([*command, Path(path).as_uri()], capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(tmp_path, width):
    path, shot = write_report(full(), tmp_path / "report.html"), tmp_path / "shot.png"
    window = f"--window-size={width},3000"
    done = browse(path, tmp_path / "one", window, f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr, done.stderr  # also what the content security policy refuses
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, width)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    assert pixels[-1000:].std() > 0.02  # figures, not an empty page
    dumped = browse(path, tmp_path / "two", window, "--dump-dom").stdout
    found = Page(dumped)
    assert found.text["h2"] == HEADINGS
    assert not found.of("script")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_console_would_be_heard(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(full_page().replace("</body>", "<script>alert(1)</script></body>"))
    done = browse(path, tmp_path / "profile", f"--screenshot={tmp_path / 'shot.png'}")
    assert "CONSOLE" in done.stderr


def test_the_terminal_shows_the_rows_of_the_page():
    table = stage_table(full().stages)
    labels = list(table.columns[0].cells)
    assert labels == [label for section in summary(full()) for label, _ in section.rows]
    cells = dict(zip(labels, table.columns[2].cells, strict=True))
    assert cells["Parameters"] == "107,612,006 (x0.80)"
    assert cells["harder (acc_norm)"].endswith("(-5.0 points)")
    assert cells["KL to dense (nats/token)"].endswith("\u00b1 0.0330")
    assert table.caption == " ".join(notes(full()))


def test_widths_that_differ_are_a_mean_and_a_range():
    stages = {"pruned": {"parameters": 5, "width": None, "widths": [7, 20, 12], "mean_width": 13.0}}
    assert list(stage_table(stages).columns[1].cells) == ["5", "13 (7 to 20)"]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_piped_table_is_not_cut(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    stages = {f"stage_{i}_with_a_long_name": {"parameters": 10**9 + i} for i in range(12)}
    show(stage_table(stages))
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "Parameters" in line)
    assert all(f"{10**9 + i:,}" in row for i in range(12))
    wide = to_markdown([f"column {i}" for i in range(40)], [[f"[b]{i}" for i in range(40)]])
    show(wide)
    assert capsys.readouterr().out == wide + "\n"


def test_the_old_path_of_the_table_warns():
    with pytest.warns(DeprecationWarning, match=r"hfprune.report.table.stage_table"):
        assert evaluation.stage_table is stage_table


def test_time_recipe_tables_and_recommendation_are_on_the_page():
    table = TextTable(title="Overlap", headings=["", "a_b"], rows=[["a_b", "1.000"]], note="Chance in brackets.")
    data = ReportData(
        title="t",
        timing={"saving": 1.0, "calibrating": 63.0},
        recipe="pruning_ratio: 0.2 # <b>\n",
        tables=[table],
        recommendation=["Take a_b."],
    )
    page = Page(render(data))
    assert page.text["h2"] == ["Recommendation", "Comparison", "Time by phase", "Recipe"]
    assert page.text["td"] == ["1.000", "1 min 3 s", "98.4 %", "1.0 s", "1.6 %"]  # the longest first
    assert "pruning_ratio: 0.2 # <b>" in "".join(page.text["pre"])
    assert "Chance in brackets." in "".join(page.text["p"])
