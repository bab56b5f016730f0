"""Figures of a report."""

import math
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest

from hfprune.report import (
    ConvergencePoint,
    FrontierPoint,
    ReportData,
    figures,
    render,
    save_figures,
)
from hfprune.report.figures import binned, chance_overlap, kl_curves, smoothed, to_bytes
from hfprune.report.table import models
from tests.helpers.reports import LAYERS, UNITS, Page, full, full_page

NAMES = ["frontier", "importance_heat_map", "kept_share", "convergence", "kl_by_position", "zero_shot"]
TRAINING = {
    "train": [(step, 100 * step, 3.0 - step / 100) for step in range(1, 101)],
    "validation": [(50, 5000, 2.8), (100, 10_000, 2.4)],
}


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


def test_kl_is_logarithmic_where_a_baseline_has_collapsed():
    def at(series, kl):
        return FrontierPoint(label=series, series=series, parameters=10, kl=kl)

    near = [at("dense", 0.0), at("a", 0.1), at("b", 0.2)]
    assert figures(ReportData(title="t", frontier=near))["frontier"].axes[0].get_yscale() == "linear"
    data = ReportData(title="t", frontier=[*near, at("magnitude", 9.0)])
    assert figures(data)["frontier"].axes[0].get_yscale() == "log"
    assert "The KL axis is logarithmic" in render(data)
