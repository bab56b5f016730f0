"""Plan packages: a base, a plan and the weights that differ give the pruned model."""

import json

import pytest
import torch

import hfprune
from hfprune.io.rebuild import REBUILD_FILE, REFIT_FILE, write_package
from hfprune.utils.errors import ConfigError, PlanError
from tests.helpers.models import save_tiny, token_ids


@pytest.fixture
def made(tmp_path):
    """Folder of a base, and how to prune it: kept MLP neurons per layer, refitted or not."""
    base = save_tiny(tmp_path / "base")

    def prune(keep, *, source=base, name="pruned", refit=False, layout="uniform"):
        model = hfprune.load(source)
        plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(n) for i, n in enumerate(keep)})
        if refit:
            hfprune.refit(model, plan, [token_ids(4, 16)])
        hfprune.apply_plan(model, plan)
        hfprune.save(model, tmp_path / name, plan=plan, layout=layout)
        return model

    prune.base, prune.root = base, tmp_path
    return prune


def rebuilt(made, folder="pruned"):
    target = made.root / f"package-{folder}"
    target.mkdir()
    record = write_package(made.root / folder, made.base, target)
    return record, target, hfprune.load(made.base, plan=target)


def same(a, b):
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("refit", [False, True])
def test_the_model_comes_back_bit_for_bit(made, refit):
    model = made((12, 12, 12), refit=refit)
    record, target, found = rebuilt(made)
    assert same(found, model)
    assert found.config.intermediate_size == 12
    assert (target / REFIT_FILE).is_file() == refit
    assert record["weights"] == (3 * 16 * 12 if refit else 0)  # the down projections
    assert not found.training


def test_layers_of_different_widths_and_two_plans_in_a_row(made):
    made((12, 8, 24), name="first", layout="per_layer")
    model = made((6, 8, 20), source=str(made.root / "first"), layout="per_layer")
    record, _, found = rebuilt(made)
    assert record["plans"] == ["plan-1.json", "plan.json"]
    assert same(found, model)


def test_a_plan_a_file_and_a_folder_prune_alike(made):
    model = made((12, 12, 12))
    folder = made.root / "pruned"
    for plan in (hfprune.PruningPlan.load(folder), folder / "plan.json", str(folder)):
        assert same(hfprune.load(made.base, plan=plan), model)


def test_the_type_is_that_of_the_pruned_model_unless_asked_for(made):
    model = hfprune.load(made.base, dtype="bfloat16")
    plan = hfprune.make_plan(model, keep={})
    hfprune.save(model, made.root / "pruned", plan=plan)
    _, target, found = rebuilt(made)
    assert found.dtype == torch.bfloat16
    assert hfprune.load(made.base, plan=target, dtype="float64").dtype == torch.float64


def test_a_trained_model_and_a_padded_export_are_refused(made):
    model = made((12, 12, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    hfprune.save(model, made.root / "tuned", plan=hfprune.PruningPlan.load(made.root / "pruned"))
    with pytest.raises(ConfigError, match=r"parameters are not those of base=.* Publish the model"):
        rebuilt(made, "tuned")
    made((12, 8, 24), name="padded", layout="padded")
    with pytest.raises(PlanError, match="padded export"):
        rebuilt(made, "padded")


def test_another_base_is_refused_by_its_fingerprint(made):
    made((12, 12, 12))
    _, target, _ = rebuilt(made)
    plan = json.loads((target / "plan.json").read_text())
    plan["provenance"]["model"] = {"path": "org/base", "dtype": "torch.float32", "fingerprint": "0" * 16}
    (target / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="was made for org/base"):
        hfprune.load(made.base, plan=target)


def test_a_plan_alone_warns_that_refitted_weights_are_missing(made):
    made((12, 12, 12))
    plan = hfprune.PruningPlan.load(made.root / "pruned")
    alone = hfprune.PruningPlan.from_json(
        plan.to_json().replace('"units"', '"compensation": {"name": "X"}, "units"', 1)
    )
    with pytest.warns(UserWarning, match="refitted weights are not in it"):
        hfprune.load(made.base, plan=alone)


def test_missing_and_damaged_packages(made):
    with pytest.raises(PlanError, match="not of the form of a hub id"):
        hfprune.load(made.base, plan=str(made.root / "none"))
    with pytest.raises(PlanError, match=r"Cannot read a plan"):
        hfprune.load(made.base, plan=made.base)
    made((12, 12, 12), refit=True)
    _, target, _ = rebuilt(made)
    (target / REFIT_FILE).write_bytes(b"x")
    with pytest.raises(PlanError, match="is damaged"):
        hfprune.load(made.base, plan=target)
    (target / REBUILD_FILE).write_text('{"format": "hfprune-rebuild", "version": 9}')
    with pytest.raises(PlanError, match="version 9"):
        hfprune.load(made.base, plan=target)


def test_equal_exports_are_equal_files(made):
    names = [f"pruned-{number}" for number in range(6)]
    for name in names:
        made((12, 12, 12), name=name)
    files = {(made.root / name / "model.safetensors").read_bytes() for name in names}
    assert len(files) == 1
