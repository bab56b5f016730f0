"""The page and its figures: what is shown, what is left out, and that nothing is loaded from elsewhere."""

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from hfprune import evaluation
from hfprune.io.save import save_importance
from hfprune.plan import PLAN_FILE, Group, PruningPlan, Slice
from hfprune.report import (
    ConvergencePoint,
    FrontierPoint,
    Generation,
    ReportData,
    TextTable,
    figures,
    read_run,
    render,
    save_figures,
    write_report,
)
from hfprune.report.data import number
from hfprune.report.figures import binned, chance_overlap, kl_curves, smoothed, to_bytes
from hfprune.report.table import models, notes, show, stage_table, summary, to_markdown
from hfprune.utils.errors import ConfigError, OutputError, PlanError

LAYERS, UNITS = 30, 48
NAMES = ["frontier", "importance_heat_map", "kept_share", "convergence", "kl_by_position", "zero_shot"]
HEADINGS = ["Warnings", "Summary", "Figures", "Models", "Sample generations", "Commands", "Facts"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def stage(parameters, perplexity, kl, accuracy):
    tasks = {f"task_{i}": {"acc": accuracy + i / 50, "acc_stderr": 0.01} for i in range(10)}
    tasks["harder"] = {"acc": 0.1, "acc_norm": accuracy, "acc_norm_stderr": 0.02}
    return {
        "parameters": parameters,
        "width": parameters // 90_000,
        "perplexity": {"value": perplexity, "protocol": "some text: 3 windows"},
        "fidelity": {
            "kl": kl,
            "kl_stderr": kl / 10,
            "top1_agreement": 1 - kl,
            "kl_by_position": [kl * (1 + 1 / (i + 1)) for i in range(64)],
        },
        "latency": {
            "prefill_ms": parameters / 1e6,
            "prefill_spread_ms": [parameters / 1.1e6, parameters / 0.9e6],
            "decode_tokens_per_s": 31.0,
            "device": "cpu",
            "threads": 2,
            "prompt_tokens": 256,
            "new_tokens": 16,
            "repeats": 5,
        },
        "size": {"bytes": 2 * parameters, "macs": 3 * parameters, "kv_cache_bytes": 2**20},
        "zero_shot": {"tasks": tasks, "average": accuracy},
    }


def full(**changes):
    rng = np.random.default_rng(0)
    groups = [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    data = {
        "title": "A run & its <title>",
        "commands": ["hfprune prune --model.path=some/model --output_dir='my folder'"],
        "stages": {
            "dense": stage(134_515_008, 19.4, 0.0, 0.46),
            "pruned": stage(107_612_006, 29.19, 0.33, 0.41),
            "recovered": stage(107_612_006, 22.8, 0.17, 0.44),
        },
        "importance": {name: list(rng.lognormal(-5, 1, UNITS)) for name in groups},
        "kept": {name: (24 + i % 3, UNITS) for i, name in enumerate(groups)},
        "convergence": [ConvergencePoint(tokens=t, overlap=o) for t, o in ((4096, 0.9), (1024, 0.8), (65536, 1.0))],
        "frontier": [
            FrontierPoint(
                label=f"{series} {share:.0%}",
                series=series,
                parameters=int(134e6 * (1 - share)),
                latency_ms=100 * (1 - share),
                perplexity=20 + 100 * share,
                kl=2 * share,
                accuracy=0.46 - share / 2,
                spread={"perplexity": (19 + 100 * share, 23 + 100 * share)},
            )
            for series in ("entropy", "cross-entropy")
            for share in (0.4, 0.1, 0.2)
        ],
        "generations": [
            Generation(
                prompt="Once <b>upon</b>", texts={"dense": "a time\n  it", "pruned": "<script>alert(1)</script>"}
            )
        ],
        "facts": {"Seed": "42", "Budget": "pruning_ratio=0.2"},
        "warnings": ["PERPLEXITY EXPLODED: <look>", "and another"],
    }
    return ReportData(**data | changes)


@functools.cache
def full_page():
    return render(full())


class Page(HTMLParser):
    """Collects what the tests ask of a page; text by the innermost open tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source", "wbr", "br"):
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


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


def test_models_that_cannot_be_drawn_are_named():
    lost = FrontierPoint(label="lost", series="entropy", parameters=5, perplexity=math.inf)
    data = full(frontier=[*full().frontier, lost])
    assert "Not drawn: lost (perplexity infinite)." in render(data)
    assert models(data)[1][-1][1][2].text == "infinite"
    only = full(frontier=[lost])
    assert "frontier" not in figures(only)
    assert "Models" in Page(render(only)).text["h2"]


def test_figures_are_deterministic(tmp_path):
    first, second = figures(full()), figures(full())
    assert list(first) == NAMES
    for name in NAMES:
        assert to_bytes(first[name], "svg") == to_bytes(second[name], "svg")
        assert to_bytes(first[name], "png") == to_bytes(second[name], "png")
    assert render(full()) == full_page()
    paths = save_figures(full(), tmp_path / "figures")
    assert sorted(path.name for path in paths) == sorted(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg"))
    width, height = first["convergence"].get_size_inches()
    assert matplotlib.image.imread(tmp_path / "figures/convergence.png").shape[:2] == (150 * height, 150 * width)


def test_a_users_matplotlibrc_changes_nothing():
    expected = to_bytes(figures(full())["kept_share"], "svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "axes.facecolor": "red"}):
        assert to_bytes(figures(full())["kept_share"], "svg") == expected


@pytest.mark.parametrize("narrow", [False, True])
def test_frontier_plots_what_was_measured(narrow):
    axes = figures(full(), narrow=narrow)["frontier"].axes
    assert [(a.get_xlabel(), a.get_ylabel()) for a in axes] == [
        (x, y)
        for x in ("parameters", "prefill time (ms)")
        for y in ("perplexity", "KL to dense (nats/token)", "zero-shot accuracy")
    ]
    assert [a.get_yscale() for a in axes] == ["log", "linear", "linear"] * 2
    line, caps, bars = axes[0].containers[0]
    assert line.get_xydata().tolist() == [[80_400_000, 60], [107_200_000, 40], [120_600_000, 30]]  # in order of size
    assert len(caps) == 2
    assert bars[0].get_segments()[0].tolist() == [[80_400_000, 59], [80_400_000, 63]]
    star = next(found for found in axes[0].lines if found.get_marker() == "*")
    assert star.get_xydata().tolist() == [[134_515_008, 19.4]]
    assert axes[3].containers[1].lines[0].get_xdata().tolist() == pytest.approx([60, 80, 90])


def test_a_dense_point_of_the_sweep_comes_before_the_stage():
    point = FrontierPoint(label="dense", series="dense", parameters=7, perplexity=5.0)
    axes = figures(full(frontier=[*full().frontier, point]))["frontier"].axes[0]
    star = next(found for found in axes.lines if found.get_marker() == "*")
    assert star.get_xydata().tolist() == [[7, 5.0]]
    assert len(axes.containers) == 2


def test_heat_map_is_sorted_and_has_the_edge():
    data = full()
    axes = figures(data)["importance_heat_map"].axes[0]
    (image,) = axes.images
    shown = image.get_array()
    assert shown.shape == (LAYERS, 256)
    assert (np.diff(shown, axis=1) <= 0).all()
    scores = sorted(data.importance["model.layers.3.mlp"], reverse=True)
    assert shown[3, 100] == pytest.approx(math.log10(scores[100 * UNITS // 256]))
    edge = axes.lines[1].get_xydata()
    assert edge[:4].tolist() == [[50, -0.5], [50, 0.5], [100 * 25 / 48, 0.5], [100 * 25 / 48, 1.5]]


def test_binning_averages_ranks():
    assert binned([1.0, 8.0, 4.0, 3.0], 2).tolist() == [6.0, 2.0]
    assert binned([1.0, math.nan], 2).tolist() == [1.0, 0.0]


def test_kept_share_and_labels():
    axes = figures(full())["kept_share"].axes[0]
    assert [bar.get_height() for bar in axes.patches][:3] == [24 / 48, 25 / 48, 26 / 48]
    assert axes.lines[0].get_ydata()[0] == pytest.approx(25 / 48)
    named = full(kept={"encoder": (1, 2), "decoder": (2, 2)})
    axes = figures(named)["kept_share"].axes[0]
    assert axes.get_xlabel() == "group"


@pytest.mark.parametrize("narrow", [False, True])
def test_tick_labels_do_not_overlap(narrow):
    for name, figure in figures(full(), narrow=narrow).items():
        figure.draw_without_rendering()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
                labels = [label for t in ticks for label in (t.label1, t.label2) if label.get_visible()]
                boxes = [label.get_window_extent() for label in labels if label.get_text()]
                spans = sorted((b.x0, b.x1) if axis is axes.xaxis else (b.y0, b.y1) for b in boxes)
                assert all(a[1] <= b[0] for a, b in pairwise(spans)), (name, axis.axis_name, spans)


def test_convergence_is_in_the_order_of_tokens():
    axes = figures(full())["convergence"].axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1024, 0.8], [4096, 0.9], [65536, 1.0]]
    assert axes.get_xscale() == "log"
    assert chance_overlap(ReportData(title="", kept={"a": (1, 4), "b": (3, 4)})) == pytest.approx((0.25 + 2.25) / 4)
    assert chance_overlap(ReportData(title="")) is None


def test_kl_curves_raw_and_smoothed():
    data = full()
    axes = figures(data)["kl_by_position"].axes[0]
    raw = data.stages["pruned"]["fidelity"]["kl_by_position"]
    assert axes.lines[0].get_ydata().tolist() == raw
    assert axes.lines[0].get_xdata().tolist() == list(range(1, 65))
    assert axes.lines[1].get_ydata()[10] == pytest.approx(sum(raw[9:12]) / 3)
    assert [line.get_label() for line in axes.lines[1::2]] == ["pruned", "recovered"]
    curve = np.array([1.0, math.nan, 3.0] + [5.0] * 61)
    assert smoothed(curve)[:3].tolist() == [1.0, 2.0, 4.0]
    stages = {"pruned": {"fidelity": {"kl_by_position": ["inf", 1.0]}}}
    assert np.isnan(kl_curves(ReportData(title="", stages=stages))["pruned"]).tolist() == [True, False]


def test_zero_shot_bars():
    axes = figures(full())["zero_shot"].axes[0]
    assert len(axes.patches) == 33
    assert [bar.get_width() for bar in axes.patches[:2]] == pytest.approx([0.46, 0.48])
    assert axes.patches[10].get_width() == 0.46  # acc_norm, which the task has beside acc
    assert axes.get_yticklabels()[10].get_text() == "harder  (acc_norm)"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"importance": {"a": [1.0] * 5, "b": [1.0]}}, ["importance_heat_map"]),  # one colour, groups of two sizes
        ({"importance": {"a": [0.0, math.nan]}}, []),
        ({"importance": {"a": []}}, []),
        ({"importance": {f"l.{i}": [1, 2] for i in range(126)}}, ["importance_heat_map"]),
        ({"convergence": [ConvergencePoint(tokens=0, overlap=0.0)]}, ["convergence"]),
        ({"frontier": [FrontierPoint(label="d", series="dense", parameters=10, kl=0.0)]}, ["frontier"]),
        (
            {"frontier": [FrontierPoint(label="$", series="$x_", parameters=9, kl=1.0, spread={"kl": (0, math.inf)})]},
            ["frontier"],
        ),
        (
            {"stages": {"dense": {"zero_shot": {"tasks": {"a": {"acc": 0.0, "acc_stderr": "nan"}, "b": {}}}}}},
            ["zero_shot"],
        ),
        (
            {"stages": {"x": {"fidelity": {"kl": "nan", "kl_stderr": None, "kl_by_position": [0.0]}}}},
            ["kl_by_position"],
        ),
    ],
)
def test_scant_and_odd_data(data, expected):
    found = ReportData(title="odd", **data)
    assert list(figures(found)) == expected
    assert Page(render(found)).open == []


def test_legends_stay_inside_the_figure():
    points = [
        FrontierPoint(label=str(i), series=f"a rather long method name {i}", parameters=10**9, perplexity=3.0 + i)
        for i in range(9)
    ]
    for narrow in (False, True):
        figure = figures(full(frontier=points), narrow=narrow)["frontier"]
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


# ---- files ---------------------------------------------------------------------------------------------------------------


def write_run(folder, **changes):
    report = {
        "command": "hfprune fit --model.path=some/model",
        "seconds": 605.0,
        "stages": {"dense": {"parameters": 10, "perplexity": {"value": "inf", "protocol": "p"}}},
        "saved": {},
        "warnings": ["look"],
        "plan": {
            "budget": {"asked": "pruning_ratio=0.2", "dense_params": 10000, "params": 8000},
            "model": {"path": "some/model", "revision": None},
        },
        "recovery": None,
        "data": {
            "calibration": {
                "source": "builtin",
                "sequences": 4,
                "tokens": 6400,
                "bos": "no BOS added",
                "sha256": "ab" * 32,
            }
        },
        "versions": {"torch": "2"},
        "config": {"seed_everything": 7},
    }
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report | changes))
    return folder


def write_plan(folder):
    groups = tuple(
        Group(name=f"layers.{i}.mlp", kind="mlp", num_units=4, slices=(Slice(module=f"l.{i}", side="in"),))
        for i in range(2)
    )
    keep = {"layers.0.mlp": (0, 2), "layers.1.mlp": (1, 2, 3)}
    PruningPlan(model_class="M", groups=groups, keep=keep, config={}).save(folder / PLAN_FILE)


def test_read_run(tmp_path):
    folder = write_run(
        tmp_path / "out",
        convergence=[[64, 0.5], [128, 1]],
        generations=[{"prompt": "a", "texts": {"dense": "b"}}],
    )
    write_plan(folder)
    scores = {"layers.1.mlp": [1.0, 2.0, 3.0, 4.0], "layers.0.mlp": [1.0, 2.0, 3.0, math.nan]}
    save_importance({name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}, folder)
    data = read_run(folder)
    assert list(data.importance) == ["layers.0.mlp", "layers.1.mlp"]  # in the order of the plan
    assert data.title == "Pruning some/model, pruning_ratio=0.2"
    assert data.commands == ["hfprune fit --model.path=some/model"]
    assert data.kept == {"layers.0.mlp": (2, 4), "layers.1.mlp": (3, 4)}
    assert data.importance["layers.1.mlp"] == [1, 2, 3, 4]
    assert data.convergence[1] == ConvergencePoint(tokens=128, overlap=1.0)
    assert data.generations == [Generation(prompt="a", texts={"dense": "b"})]
    assert data.warnings == ["look"]
    assert data.facts == {
        "Budget": "pruning_ratio=0.2; parameters 10,000 to 8,000",
        "Model": "path some/model",
        "Calibration data": "builtin, 4 sequences, 6,400 tokens, no BOS added; SHA-256 abababababab",
        "Seed": "7",
        "Duration": "10 min 5 s",
        "Versions": "torch 2",
    }
    assert list(figures(data)) == ["importance_heat_map", "kept_share", "convergence"]
    assert "infinite" in render(data)


def test_read_run_of_the_least(tmp_path):
    (tmp_path / "report.json").write_text('{"stages": {}}')
    assert read_run(tmp_path) == ReportData(
        title=f"Run {tmp_path.name}", commands=[], convergence=[], generations=[], warnings=[]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no report.json"),
        ("{", "is not valid JSON"),
        ("[]", "is not the report of a run"),
        ("{}", "is not the report of a run"),
        ('{"stages": {"dense": 3}}', "every stage must be an object"),
        ('{"stages": {}, "convergence": [[1]]}', "is not the report of a run"),
        ('{"stages": {}, "generations": [{}]}', "is not the report of a run"),
    ],
)
def test_what_is_not_a_run(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)


def test_a_broken_plan_is_said(tmp_path):
    write_run(tmp_path)
    (tmp_path / PLAN_FILE).write_text("{}")
    with pytest.raises(PlanError, match=PLAN_FILE):
        read_run(tmp_path)


def test_writing_is_one_step(tmp_path, monkeypatch):
    path = write_report(full(), tmp_path / "new" / "report.html")
    before = path.read_text(encoding="utf-8")
    assert before == full_page()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_report(ReportData(title="other"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_numbers():
    assert [number(v) for v in (1, 2.5, "-inf", None, True, "12", [])] == [1.0, 2.5, -math.inf, None, None, None, None]
    assert math.isnan(number("nan"))


# ---- a browser -----------------------------------------------------------------------------------------------------------


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


TRAINING = {
    "train": [(step, 100 * step, 3.0 - step / 100) for step in range(1, 101)],
    "validation": [(50, 5000, 2.8), (100, 10_000, 2.4)],
}


@pytest.mark.parametrize("narrow", [False, True])
def test_training_curve_shows_losses_by_steps_and_tokens(narrow):
    found = figures(ReportData(title="t", training=TRAINING), narrow=narrow)["training_curve"]
    (axes,) = found.axes
    raw, bold, validation = axes.lines
    assert raw.get_xydata().tolist() == [[step, loss] for step, _, loss in TRAINING["train"]]
    assert validation.get_xydata().tolist() == [[50, 2.8], [100, 2.4]]
    assert (bold.get_label(), validation.get_label()) == ("training", "validation")
    (top,) = axes.child_axes
    to_bytes(found, "svg")  # places the second axis
    assert top.get_xlabel() == "tokens"
    assert top.get_xlim() == pytest.approx([100 * x for x in axes.get_xlim()])


def test_a_distillation_loss_has_a_panel_of_its_own():
    data = ReportData(title="t", training=TRAINING, training_loss="distillation")
    axes = figures(data)["training_curve"].axes
    assert [a.get_ylabel() for a in axes] == ["distillation (nats/token)", "cross-entropy (nats/token)"]
    assert "do not compare" in render(data)


def test_an_interrupted_or_untrained_run_has_no_curve():
    assert figures(ReportData(title="t", training={})) == {}
    assert figures(ReportData(title="t", training={"train": [(1, 8, math.nan)]})) == {}
    assert "training_curve" in figures(ReportData(title="t", training={"validation": [(0, 0, 2.0)]}))


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


def test_kl_is_logarithmic_where_a_baseline_has_collapsed():
    def at(series, kl):
        return FrontierPoint(label=series, series=series, parameters=10, kl=kl)

    near = [at("dense", 0.0), at("a", 0.1), at("b", 0.2)]
    assert figures(ReportData(title="t", frontier=near))["frontier"].axes[0].get_yscale() == "linear"
    data = ReportData(title="t", frontier=[*near, at("magnitude", 9.0)])
    assert figures(data)["frontier"].axes[0].get_yscale() == "log"
    assert "The KL axis is logarithmic" in render(data)
