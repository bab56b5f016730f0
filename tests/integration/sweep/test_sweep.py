"""A sweep: what it scores, that it is not done twice, and that an interrupted one ends as one that was not."""

import csv
import json
import logging
import re

import pytest
import torch

import hfprune.sweep.pruner as pruner
import hfprune.sweep.runner as runner
from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule, WeightTaylor
from hfprune.allocation import CosineSoftmax, GlobalRank, Sensitivity, Uniform
from hfprune.compensation import LeastSquares, MeanCompensation
from hfprune.criteria import (
    ActivationNorm,
    ActivationTaylor,
    CoupledTaylor,
    Fisher,
    Magnitude,
    Random,
    Reconstruction,
    SelfDistillation,
    SlimLLMHeads,
)
from hfprune.evaluation import perplexity
from hfprune.models import find_groups
from hfprune.pruning.calibration import Calibration
from hfprune.sweep import Method, Sweep, SweepGrid, scoring
from hfprune.sweep.scoring import seed_scores, shared_pass
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny, token_ids

pytestmark = pytest.mark.usefixtures("undrawn")

METHODS = [
    Method(name="entropy", objective="entropy"),
    Method(name="signed", objective="cross_entropy", criterion=ActivationTaylor(reduction="signed")),
    Method(name="weight", objective="entropy", criterion=WeightTaylor()),
    Method(name="magnitude", criterion=Magnitude()),
    Method(name="random", criterion=Random()),
    Method(name="norm", criterion=ActivationNorm()),
    Method(name="fisher", criterion=Fisher()),
    Method(name="sdmprune", criterion=CoupledTaylor(), distillation=SelfDistillation(first_stage=0.1)),
    Method(name="refit", criterion=ActivationNorm(), compensation=LeastSquares()),
    Method(name="reconstruction", criterion=Reconstruction(), compensation=LeastSquares()),
    Method(name="global", objective="entropy", allocation=GlobalRank(), units=("mlp", "heads")),
    Method(name="layers", objective="entropy", units=("layers", "mlp")),
    Method(name="rounds", objective="entropy", units=("mlp", "heads"), rounds=2, schedule="linear"),
    Method(name="curves", objective="entropy", allocation=Sensitivity(sequences=2)),
    Method(name="cosines", objective="entropy", allocation=CosineSoftmax(sequences=2)),
]
CALIBRATED = [method for method in METHODS if method.calibrated]
SEEDED = [method for method in METHODS if method.seeded and method.name != "random"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def make_data(seed, text):
    sizes = {"seq_len": 16, "calibration_sequences": 5, "eval_window": 16, "eval_windows": 0 if text is None else 3}
    return TextDataModule(seed=seed, text=text, **sizes)


WORDS = "the assert statement is a part of the language and so is while, for and in: it of a " * 3
TEXT = ""


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """An evaluation text that is no part of the built-in one."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    globals()["TEXT"] = str(path)


def grid(**kwargs):
    settings = {"methods": METHODS, "pruning_ratios": [0.2, 0.3], "seeds": [1, 2], "texts": {"docs": TEXT}}
    return SweepGrid(**settings | kwargs)


def sweep(folder, out, **kwargs):
    return Sweep(PruningModule(folder), grid(**kwargs), make_data, out, latency=False)


def comparable(result):
    """A result without what differs between two runs: times."""
    return json.loads(json.dumps(result), parse_constant=str)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    return sweep(folder, out).run(), out


def test_rows(undisturbed):
    result, out = undisturbed
    rows = {(row["method"], row["pruning_ratio"]): row for row in result["rows"]}
    assert next(iter(rows)) == ("dense", None)
    assert len(rows) == 1 + 2 * len(METHODS)
    assert rows["dense", None]["docs_kl"] == pytest.approx(0, abs=1e-9)
    assert {method: rows[method, 0.2]["seeds"] for method in ("entropy", "magnitude", "random")} == {
        "entropy": 2, "magnitude": 1, "random": 2,
    }  # fmt: skip
    cells = [result["cells"][f"entropy-0.3-seed{seed}"] for seed in (1, 2)]
    values = [cell["texts"]["docs"]["perplexity"]["value"] for cell in cells]
    row = rows["entropy", 0.3]
    assert row["docs_perplexity"] == pytest.approx(sum(values) / 2)
    assert row["docs_perplexity_sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (row["docs_perplexity_low"], row["docs_perplexity_high"]) == (min(values), max(values))
    assert rows["entropy", 0.3]["parameters"] == result["budgets"]["0.3"]["entropy"]["params"]
    assert "docs_perplexity_sd" not in rows["magnitude", 0.3]
    written = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in written] == [row["method"] for row in result["rows"]]
    assert float(written[1]["docs_perplexity"]) == result["rows"][1]["docs_perplexity"]


def test_tables_and_page(undisturbed):
    result, out = undisturbed
    text = (out / "table.md").read_text()
    assert "| dense | - |" in text
    assert "| entropy | 20% |" in text
    assert "first 3 non-overlapping windows of 16 tokens, no BOS added" in text
    assert re.search(r"Calibration: .* sequences, [0-9,]+ tokens, no BOS added[.]", text)
    assert list(result["rank_correlation"]) == [m.name for m in METHODS if m.name != "reconstruction"]
    assert result["rank_correlation"]["norm"]["refit"] == pytest.approx(1)
    for matrix in (result["rank_correlation"], *result["kept_overlap"].values()):
        assert all(matrix[name][name] == pytest.approx(1.0) for name in matrix)
        assert matrix["entropy"]["random"] < 1
    assert set(result["seed_overlap"]["0.2"]) == {"random", *(method.name for method in SEEDED)}
    chance = result["chance_overlap"]["0.2"]["entropy"]["random"]
    assert 0.3 < chance < result["kept_overlap"]["0.2"]["entropy"]["entropy"]
    assert f"({chance:.3f})" in text
    assert [found["pruning_ratio"] for found in result["recommended"]] == [0.2, 0.3]
    assert result["recommended_command"] is None  # a sweep in Python has no file for --config
    assert result["recommendation"][0] in text
    page = (out / "report.html").read_text()
    assert "Sweep of" in page
    assert all(part in page for part in ("Recommendation", "Rank correlation", "JS distance", "Model hash", "torch"))
    assert (out / "figures/frontier.svg").is_file()


def test_kept_units_are_those_of_a_run_of_its_own(folder, undisturbed):
    """The shared pass changes nothing: the callback, alone, with the same data, prunes to the same model."""
    result, _ = undisturbed
    for method in SEEDED:
        importance = TaylorImportanceCallback(
            pruning_ratio=0.2,
            criterion=method.scorer,
            objective=method.objective,
            self_distillation=method.distillation,
            units=method.units,
            allocation=method.allocation,
            compensation=method.compensation,
            rounds=method.rounds,
            schedule=method.schedule,
        )
        trainer = PruneTrainer(
            callbacks=[importance], accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, max_epochs=1,
        )  # fmt: skip
        module, data = PruningModule(folder), make_data(2, TEXT)
        trainer.prune(module, data)
        found = perplexity(module.causal_lm, data.evaluation_windows()).value
        expected = result["cells"][f"{method.name}-0.2-seed2"]["texts"]["docs"]["perplexity"]["value"]
        assert found == pytest.approx(expected, rel=1e-6)


class Stop(Exception):
    """An interruption."""


@pytest.mark.parametrize(
    "after", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(13, marks=pytest.mark.slow)]
)
def test_interrupted_and_resumed_it_gives_the_same_table(folder, undisturbed, tmp_path, monkeypatch, after):
    calls, measure = [], runner.measure

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise Stop
        return measure(*args, **kwargs)

    monkeypatch.setattr(runner, "measure", failing)
    with pytest.raises(Stop):
        sweep(folder, tmp_path / "out").run()
    result = sweep(folder, tmp_path / "out").run()
    assert len(calls) == 1 + len(undisturbed[0]["cells"])  # nothing but the interrupted one was measured twice
    assert comparable(result["rows"]) == comparable(undisturbed[0]["rows"])
    assert result["kept_overlap"] == undisturbed[0]["kept_overlap"]
    assert (tmp_path / "out/table.csv").read_text() == (undisturbed[1] / "table.csv").read_text()


def test_a_finished_sweep_runs_nothing_again(folder, undisturbed, monkeypatch):
    result, out = undisturbed
    monkeypatch.setattr(runner, "measure", None)
    monkeypatch.setattr(Calibration, "run", None)
    assert comparable(sweep(folder, out).run()["rows"]) == comparable(result["rows"])


def test_another_model_or_other_data_are_computed_anew(folder, undisturbed, tmp_path):
    other = save_tiny(tmp_path / "other", seed=5)
    first = sweep(folder, tmp_path / "out", methods=METHODS[:1], seeds=[1]).run()
    second = sweep(other, tmp_path / "out", methods=METHODS[:1], seeds=[1]).run()
    expected = sweep(other, tmp_path / "fresh", methods=METHODS[:1], seeds=[1]).run()
    assert comparable(second["rows"]) == comparable(expected["rows"]) != comparable(first["rows"])


def other_data(seed, text):
    data = make_data(seed, text)
    return TextDataModule(seed=seed, text=text, seq_len=8, calibration_sequences=3, eval_window=16,
                          eval_windows=data.eval_windows)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"round_to": 8}, make_data),
        ({"methods": [Method(name="entropy", objective="entropy", criterion=WeightTaylor())]}, make_data),
        ({"methods": [Method(name="entropy", objective="cross_entropy")]}, make_data),
        ({}, other_data),
    ],
    ids=["round_to", "criterion", "objective", "calibration"],
)
def test_a_cell_whose_units_changed_is_measured_anew(folder, tmp_path, monkeypatch, change, data):
    """Its name stays the same: method, ratio and seed."""
    few = {"methods": METHODS[:1], "seeds": [1], "pruning_ratios": [0.3]}
    sweep(folder, tmp_path / "out", **few).run()
    kept = []
    apply = pruner.apply_plan
    monkeypatch.setattr(pruner, "apply_plan", lambda model, plan: (kept.append(plan.keep), apply(model, plan)))
    made = Sweep(PruningModule(folder), grid(**few | change), data, tmp_path / "out", latency=False)
    found = made.run()
    again = Sweep(PruningModule(folder), grid(**few | change), data, tmp_path / "fresh", latency=False).run()
    assert comparable(found["rows"]) == comparable(again["rows"])
    assert len(kept) == 2
    assert kept[0] == kept[1]


def test_a_ratio_may_be_added_and_speeds_are_those_of_the_widths(folder, tmp_path, monkeypatch):
    timed, compare = [], runner.compare_latency

    def spy(models):
        timed.append([model.config.intermediate_size for model in models])
        return compare(models, prompt_tokens=4, new_tokens=2, repeats=1, warmup=0)

    monkeypatch.setattr(runner, "compare_latency", spy)
    few = {"methods": METHODS[3:4], "seeds": [1]}
    for change in ({"pruning_ratios": [0.2]}, {"pruning_ratios": [0.2, 0.3]}, {"pruning_ratios": [0.2], "round_to": 8}):
        made = Sweep(PruningModule(folder), grid(**few | change), make_data, tmp_path / "out")
        for _ in range(2):  # the second time from its files
            assert list(made.run()["speeds"]) == ["-", *(f"{r:.0%}" for r in change["pruning_ratios"])]
    assert len(timed) == 3
    assert timed[2][1:] == [made.pruner.budget(METHODS[3], 0.2).width] != timed[0][1:]


def test_a_damaged_cell_is_measured_again(folder, tmp_path):
    few = {"methods": METHODS[3:4], "seeds": [1], "pruning_ratios": [0.2]}
    first = sweep(folder, tmp_path / "out", **few).run()
    (tmp_path / "out/cells/magnitude-0.2.json").write_text('{"key": "')
    assert comparable(sweep(folder, tmp_path / "out", **few).run()["rows"]) == comparable(first["rows"])


def test_an_interrupted_pass_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SAVE_EVERY", 2)
    model = tiny()
    batches = [{"input_ids": token_ids(2, 8, seed=seed)} for seed in range(4)]  # 8 sequences

    def interrupted():
        yield from batches[:2]
        yield {"input_ids": batches[2]["input_ids"][:1]}
        raise Stop

    methods = [method for method in CALIBRATED if method.distillation is None]
    path = tmp_path / "seed1.safetensors"
    with pytest.raises(Stop):
        seed_scores(model, methods, interrupted(), path, key="k")
    seen = []
    step = Calibration._step
    monkeypatch.setattr(Calibration, "_step", lambda self, t, a: (seen.append(t.index), step(self, t, a))[1])
    found = seed_scores(model, methods, iter(batches), path, key="k")
    assert seen == [4, 5, 6, 7]  # four of the five sequences were saved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed1.safetensors"]
    whole = shared_pass(model, methods, batches)
    whole.run()
    for method, by_group in zip(methods, whole.scores(), strict=True):
        assert all(torch.equal(found[method.name][group], score) for group, score in by_group.items())
    again = seed_scores(model, methods, iter([]), path, key="k")
    assert all(torch.equal(again[m][g.name], found[m][g.name]) for m in again for g in find_groups(model))
    path.write_bytes(b"damaged")
    assert seed_scores(model, methods, iter(batches), path, key="k").keys() == found.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": []}, r"methods=\[\] must name at least one"),
        ({"methods": METHODS[:1] * 2}, "each once"),
        ({"pruning_ratios": []}, r"pruning_ratios=\[\]"),
        ({"seeds": [1, 1]}, "seeds=.* each once"),
        ({"texts": {"a b": "builtin"}}, "texts: names"),
        ({"texts": {}}, "texts={} must name"),
        ({"task_seeds": 0}, "task_seeds=0 must be"),
    ],
)
def test_bad_grids(settings, message):
    with pytest.raises(ConfigError, match=message):
        grid(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b", "objective": "entropy"}, "method name 'a/b'"),
        ({"name": "dense", "objective": "entropy"}, "method name 'dense'"),
        ({"name": "a"}, "needs an objective: cross_entropy, entropy"),
        ({"name": "a", "objective": "entropy", "rounds": 0}, "rounds=0 must be positive"),
        (
            {"name": "a", "criterion": CoupledTaylor(), "distillation": SelfDistillation(), "rounds": 2},
            "cannot be combined",
        ),
        ({"name": "a", "objective": "entropie"}, "Unknown objective 'entropie'"),
        ({"name": "a", "criterion": Magnitude(), "objective": "entropy"}, "takes no objective"),
        ({"name": "a", "criterion": ActivationNorm(), "objective": "entropy"}, "Method 'a': .* takes no objective"),
        ({"name": "a", "criterion": Fisher(), "objective": "entropy"}, "not 'entropy'"),
        ({"name": "a", "objective": "entropy", "distillation": SelfDistillation()}, "remove objective="),
        ({"name": "a", "objective": "entropy", "units": ["mlp", "head"]}, "Method 'a': .*head"),
        ({"name": "a", "objective": "entropy", "allocation": Uniform(share=0.2)}, "sets the widths itself"),
    ],
)
def test_bad_methods(settings, message):
    with pytest.raises(ConfigError, match=message):
        grid(methods=[Method(**settings)])


def test_ratios_above_half_are_said_loudly_before_anything_is_loaded(folder, tmp_path, monkeypatch, caplog):
    logger = logging.getLogger("hfprune")
    logger.addHandler(caplog.handler)
    removing = Method(name="a", criterion=Magnitude(), units=("mlp", "heads"))
    compared = sweep(folder, tmp_path / "out", methods=[removing], pruning_ratios=[0.2, 0.55])

    def load(*args):
        raise Stop

    monkeypatch.setattr(PruningModule, "configure_model", load)
    with pytest.raises(Stop):
        compared.run()
    logger.removeHandler(caplog.handler)
    assert len(compared.warnings) == 1
    assert "more than half" in compared.warnings[0]
    assert "WARNING: pruning_ratio=0.55, units=mlp+heads removes 54.7% of the parameters" in caplog.text


def test_an_impossible_ratio_is_said_before_anything_is_loaded(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"largest possible `pruning_ratio`"):
        sweep(folder, tmp_path / "out", pruning_ratios=[0.2, 0.9])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": Reconstruction(), "units": ("layers",)}, "Method 'a': Reconstruction processes the layers"),
        ({"criterion": Reconstruction(), "allocation": GlobalRank()}, "needs all scores"),
        (
            {"criterion": CoupledTaylor(), "distillation": SelfDistillation(), "allocation": GlobalRank()},
            "known before scoring",
        ),
        ({"criterion": CoupledTaylor(), "distillation": SelfDistillation(first_stage=0.5)}, "Lower it"),
        ({"criterion": SlimLLMHeads()}, "Method 'a': SlimLLMHeads"),
        ({"criterion": ActivationNorm(), "compensation": MeanCompensation()}, "requires projections with a bias"),
    ],
)
def test_parts_that_do_not_go_together_are_said_before_anything_is_loaded(folder, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        sweep(folder, tmp_path / "out", methods=[Method(name="a", **settings)])


def test_cells_of_the_first_seed_come_first():
    names = [cell.name for cell in grid().cells()]
    assert names[:3] == ["entropy-0.2-seed1", "entropy-0.3-seed1", "signed-0.2-seed1"]
    assert names.index("random-0.3-seed1") < names.index("entropy-0.2-seed2")
    assert [name for name in names if name.startswith("magnitude")] == ["magnitude-0.2", "magnitude-0.3"]
    tasks = [cell.name for cell in grid().cells() if grid().runs_tasks(cell)]
    assert all("seed2" not in name for name in tasks)
    assert len(tasks) == 2 * len(METHODS)


def test_an_evaluation_text_that_calibrates_is_said(folder, tmp_path):
    from pydoc_data.topics import topics

    (tmp_path / "seen.txt").write_text(topics["assert"])
    (tmp_path / "seen.json").write_text(json.dumps([topics["assert"]]))

    def data(seed, text):
        source = str(tmp_path / "seen.json")
        return TextDataModule(
            calibration=source, recovery="builtin", seed=seed, text=text, seq_len=16, calibration_sequences=20,
            eval_window=16, eval_windows=0 if text is None else 3,
        )  # fmt: skip

    made = Sweep(
        PruningModule(folder),
        grid(methods=METHODS[:1], seeds=[1], texts={"seen": str(tmp_path / "seen.txt")}),
        data,
        tmp_path / "out",
        latency=False,
    )
    with pytest.warns(UserWarning, match="13-grams of the evaluation text 'seen' occur"):
        assert len(made.run()["warnings"]) == 1
