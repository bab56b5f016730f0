"""What results may replace, and what they may not."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file

import hfprune
from hfprune import apply_plan
from hfprune.callbacks import ReportCallback, SparsePruningCallback
from hfprune.cli import main
from hfprune.io import save as export
from hfprune.io import save as saved
from hfprune.io.output_folder import RESULTS, check_apart
from hfprune.io.save import check_output_dir, check_output_file, export_model
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.sparse.state import LayerState
from hfprune.utils.errors import ConfigError, OutputError
from hfprune.utils.files import write_json
from tests.helpers.models import save_tiny, tiny
from tests.helpers.plans import mlp_plan

pytestmark = pytest.mark.usefixtures("empty_folder")

PLAN = PruningPlan(model_class="M", groups=(), keep={}, config={})


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder that hfprune exported."""
    folder = tmp_path_factory.mktemp("pruned") / "OUT" / "model"
    export_model(tiny(dtype=torch.float32), None, PLAN, folder)
    return folder


def everything(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(folder, match, **kwargs):
    before = everything(folder.parent)
    with pytest.raises(ConfigError, match=match):
        export_model(tiny(dtype=torch.float32), None, PLAN, folder, **kwargs)
    assert everything(folder.parent) == before


def test_a_folder_of_the_user_is_not_replaced(tmp_path):
    target = tmp_path / "results"
    target.mkdir()
    (target / "mine").write_text("mine")
    refused(target, "target='.*' is not empty")
    refused(target, "hfprune did not write 'mine'", overwrite=True)
    save_file({"w": torch.ones(1)}, target / "model.safetensors")
    (target / "config.json").write_text("{}")
    refused(target, "hfprune did not write", overwrite=True)


def test_a_model_is_replaced_when_that_is_asked_for(tmp_path):
    target = tmp_path / "model"
    for number in range(2):
        model = tiny(seed=number, dtype=torch.float32)
        export_model(model, None, PLAN, target, overwrite=number > 0)
        assert torch.equal(load_file(target / "model.safetensors")["model.norm.weight"], model.model.norm.weight)
    refused(target, "is not empty")
    (target / "notes").mkdir()
    (target / "notes" / "mine").write_text("mine")
    refused(target, "hfprune did not write 'notes'", overwrite=True)


def test_a_model_with_code_is_replaced_and_code_of_others_is_not(tmp_path):
    target = tmp_path / "model"
    for overwrite in (False, True):
        model = tiny(dtype=torch.float32)
        plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(8 + 4 * i) for i in range(3)})
        hfprune.apply_plan(model, plan)
        export_model(model, None, plan, target, layout="per_layer", overwrite=overwrite)
        assert (target / "modeling_hfprune.py").is_file()
    (target / "modeling_mine.py").write_text('"""My model."""')
    refused(target, "hfprune did not write 'modeling_mine.py'", overwrite=True)


@pytest.mark.parametrize("name", ["home", "current", "above"])
def test_home_and_the_current_folder_are_not_replaced(name, tmp_path, monkeypatch):
    target = tmp_path / "place"
    export_model(tiny(dtype=torch.float32), None, PLAN, target)  # even where hfprune wrote all of it
    if name == "home":
        monkeypatch.setenv("HOME", str(target))
    else:
        (target / "additional_chat_templates").mkdir()
        monkeypatch.chdir(target if name == "current" else target / "additional_chat_templates")
    refused(target, "your home folder" if name == "home" else "the current folder", overwrite=True)


@pytest.mark.parametrize("where", ["equal", "above", "inside", "link"])
def test_export_never_touches_its_source(where, pruned, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(pruned)
    target = {"equal": pruned, "above": pruned.parent, "inside": pruned / "new", "link": link}[where]
    before = everything(pruned.parent)
    flags = [f"--model.path={pruned}", "--layout=padded", f"--output_dir={target}", "--overwrite=true"]
    assert main(["export", *flags]) == 2
    assert "overlap" in capsys.readouterr().err
    assert everything(pruned.parent) == before
    assert not (pruned / "new").exists()


def test_the_source_is_known_in_python(tmp_path):
    folder = save_tiny(tmp_path / "source")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = everything(folder)
    with pytest.raises(ConfigError, match="overlap"):
        export_model(model, None, PLAN, tmp_path / "source", overwrite=True)
    assert everything(folder) == before


def test_state_of_layers_is_refused_in_a_folder_of_the_user(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mine").write_text("mine")
    (runs / "settings.json").write_text("{}")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="state_dir='.*runs' holds files that hfprune did not write"):
            LayerState(runs, {"a": 1}, fresh=fresh)
    assert sorted(path.name for path in runs.iterdir()) == ["mine", "settings.json"]


def test_state_of_layers_is_dropped_without_what_others_added(tmp_path):
    state = LayerState(tmp_path / "layers", {"a": 1})
    state.save("layer-00000", {"w": torch.ones(1)}, {})
    (tmp_path / "layers" / "mine").write_text("mine")
    callback = SparsePruningCallback(method="wanda", sparsity=0.5, state_dir=tmp_path / "layers")

    class Trainer:
        is_global_zero = True

    callback.teardown(Trainer(), None, "fit")
    assert [path.name for path in (tmp_path / "layers").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [PLAN_FILE, "report.json", "report.html", "figures", "checkpoints", "model", "layers"])
def test_results_never_replace_what_hfprune_did_not_write(name, tmp_path):
    out = tmp_path / "out"
    if "." in name:
        out.mkdir()
        (out / name).write_text("mine")
    else:
        (out / name).mkdir(parents=True)
        (out / name / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="hfprune did not write"):
        check_output_dir(out, overwrite=True)


@pytest.mark.parametrize("name", ["dense", "earlier"])
def test_folders_among_checkpoints_are_hfprunes_own(name, tmp_path):
    (tmp_path / "out" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / name / "last.ckpt").write_bytes(b"")
    assert check_output_dir(tmp_path / "out", overwrite=True) == tmp_path / "out"


def test_files_of_the_user_between_results_are_no_trouble(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    PLAN.save(tmp_path / "out" / PLAN_FILE)
    write_json(tmp_path / "out" / "report.json", {"stages": {}, "plan": {}})
    check_output_dir(tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="is not empty"):
        check_output_dir(tmp_path / "out", overwrite=False)


def test_a_variable_in_the_environment_does_not_open_the_folder(tmp_path, monkeypatch, capsys):
    dense = save_tiny(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning reads it when it is imported
    flags = [f"--model.path={dense}", "--output_dir=out", "--pruning_ratio=0.2", "--trainer.accelerator=cpu"]
    assert main(["prune", *flags, "--data.seq_len=16", "--data.eval_windows=0"]) == 2
    assert "'out' is not empty" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["mine"]


def test_other_ranks_leave_the_check_to_the_first(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        ReportCallback(str(tmp_path))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    ReportCallback(str(tmp_path))


def test_an_evaluation_replaces_nothing_but_an_evaluation(tmp_path):
    path = tmp_path / "figures.json"
    check_output_file(path, "output")
    path.write_text(json.dumps({"stages": {}}))
    check_output_file(path, "output")
    for other in ("mine", "[]", json.dumps({"stages": {}, "plan": {}})):
        path.write_text(other)
        with pytest.raises(ConfigError, match="not the result of an evaluation"):
            check_output_file(path, "output")


@pytest.mark.parametrize(
    ("out", "source"),
    [("m", "m"), ("m/out", "m"), (".", "model"), (".", "model/model.safetensors"), (".", "checkpoints"), ("x", "link")],
)
def test_output_and_input_are_apart(out, source, tmp_path):
    for folder in ("m", "model", "checkpoints", "x"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"output_dir='.*' and model.path='.*' overlap"):
        check_apart(Path(out), {"model.path": source}, names=RESULTS)


def test_input_beside_the_results_is_no_trouble(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "data.txt").write_text("text")
    check_apart(tmp_path, {"model.path": tmp_path / "dense", "data.text": tmp_path / "data.txt"}, names=RESULTS)
    check_apart(tmp_path / "out", {"model.path": "org/name", "data.text": None}, names=RESULTS)


def test_prune_into_its_own_model_folder_is_refused(tmp_path, capsys):
    dense = save_tiny(tmp_path / "OUT" / "model")
    before = everything(dense)
    flags = [f"--model.path={dense}", "--pruning_ratio=0.2", "--trainer.accelerator=cpu", "--data.seq_len=16"]
    for out in (tmp_path / "OUT", dense):
        assert main(["prune", *flags, f"--output_dir={out}", "--overwrite=true", "--data.eval_windows=0"]) == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if "error:" in line]) == 1
        assert everything(dense) == before


def test_rounding_of_its_own_check_loses_no_model(tmp_path, monkeypatch):
    """Padded logits are rounded in another order; in float64 that does not matter."""
    model = tiny(dtype=torch.float32)
    plan = mlp_plan(model)
    apply_plan(model, plan)
    first, kept = saved._first_logits, {name: p.clone() for name, p in model.state_dict().items()}

    def rounded(found):
        wide = next(found.parameters()).dtype == torch.float64
        return first(found) + (0.0 if wide or found is model else 1e-2)

    monkeypatch.setattr(saved, "_first_logits", rounded)
    figures = export_model(model, None, plan, tmp_path / "m", layout="padded")
    assert figures["max_logit_difference_after_reload"] > 5e-3  # as measured in the model's own type
    assert all(torch.equal(kept[name], p) and kept[name].dtype == p.dtype for name, p in model.state_dict().items())


def test_a_weight_that_changed_on_its_way_fails_the_check_and_is_kept(tmp_path, monkeypatch):
    class Changed(type(export.LAYOUTS.get("uniform"))):
        def compress(self, folder):
            found = load_file(folder / "model.safetensors")
            found["model.norm.weight"][0] += 1e-6  # no logit would tell
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
            return True

    monkeypatch.setattr(export.LAYOUTS, "get", lambda name: Changed())
    model = tiny(dtype=torch.float32)
    with pytest.raises(
        OutputError, match=r"model.norm.weight differs from the one in memory.*kept in '.*m.failed-check'"
    ):
        export_model(model, None, PLAN, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert (tmp_path / "m.failed-check" / "model.safetensors").is_file()
