"""The functional API: the same numbers as a run of the trainer, plans of one's own, saving and loading."""

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

import hfprune
from hfprune import Budget, PruneTrainer, PruningModule, TaylorImportanceCallback
from hfprune.allocation import Explicit, GlobalRank, Sensitivity
from hfprune.compensation import LeastSquares
from hfprune.criteria import ActivationNorm, ActivationTaylor, Fisher, Magnitude, Reconstruction
from hfprune.utils.errors import CalibrationError, ConfigError, PlanError
from tests.helpers.models import save_tiny, tiny, token_ids

BATCHES = [token_ids(2, length, seed=length) for length in (9, 12, 7)]


class Data(LightningDataModule):
    """Calibration data of given batches."""

    def calibration_dataloader(self):
        return DataLoader([{"input_ids": batch} for batch in BATCHES], batch_size=None)


def pruned(folder, **options):
    """Returns module and callback after ``PruneTrainer.prune``."""
    callback = TaylorImportanceCallback(**options)
    trainer = PruneTrainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = PruningModule(str(folder))
    trainer.prune(module, Data())
    return module, callback


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(
    ("criterion", "objective", "units"),
    [
        (ActivationTaylor(), None, ("mlp",)),
        (ActivationTaylor(), "cross_entropy", ("mlp", "heads")),
        (Fisher(), None, ("mlp", "heads", "layers")),
        (ActivationNorm(), None, ("mlp",)),
        (Magnitude(), None, ("mlp", "heads")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else "+".join(value),
)
def test_scores_and_kept_units_are_those_of_the_trainer(folder, criterion, objective, units):
    options = {"criterion": criterion, "objective": objective, "units": units}
    module, callback = pruned(folder, pruning_ratio=0.2, **options)
    model = hfprune.load(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = hfprune.score(model, BATCHES, criterion, objective=objective, units=units)
    assert scores.keys() == callback.importance.keys()
    assert all(torch.equal(scores[name], expected) for name, expected in callback.importance.items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    plan = hfprune.make_plan(model, scores, budget=0.2)
    assert plan.keep == module.plan.keep
    assert plan.config == module.plan.config
    hfprune.apply_plan(model, plan)
    assert all(torch.equal(module.causal_lm.state_dict()[n], t) for n, t in model.state_dict().items())


def test_refitted_weights_are_those_of_the_trainer(folder):
    module, _ = pruned(folder, pruning_ratio=0.2, compensation=LeastSquares())
    model = hfprune.load(folder)
    plan = hfprune.make_plan(model, hfprune.score(model, BATCHES), budget=0.2)
    errors = hfprune.refit(model, plan, BATCHES)
    assert errors.keys() == plan.keep.keys()
    assert all(0 < error < 1 for error in errors.values())
    hfprune.apply_plan(model, plan)
    assert all(torch.equal(module.causal_lm.state_dict()[n], t) for n, t in model.state_dict().items())
    with pytest.raises(PlanError, match="refit before apply_plan"):
        hfprune.refit(model, plan, BATCHES)


def test_batches_of_any_form_give_the_same_scores():
    model = tiny("llama")
    expected = hfprune.score(model, BATCHES[:1])
    for form in (BATCHES[0], {"input_ids": BATCHES[0]}, [{"input_ids": BATCHES[0]}], iter(BATCHES[0].split(1))):
        found = hfprune.score(model, form)
        assert all(torch.equal(found[name], scores) for name, scores in expected.items())


def test_own_indices_are_kept(tmp_path):
    model = tiny("llama")
    keep = {"model.layers.1.mlp": torch.tensor([5, 3, 11]), "model.layers.0.self_attn": [1]}
    plan = hfprune.make_plan(model, keep=keep)
    assert plan.keep["model.layers.1.mlp"] == (3, 5, 11)
    assert plan.keep["model.layers.0.self_attn"] == (1,)
    assert plan.keep["model.layers.0.mlp"] == tuple(range(24))
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    hfprune.apply_plan(model, plan)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before[:, [3, 5, 11]])
    with pytest.raises(ConfigError, match="uniform"):
        hfprune.save(model, tmp_path / "uniform")
    hfprune.save(model, tmp_path / "own", layout="per_layer")  # the plan is the model's own
    again = hfprune.load(tmp_path / "own")
    assert torch.equal(again(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_saving_without_a_plan(tmp_path):
    model = tiny("llama")
    hfprune.apply_plan(model, hfprune.make_plan(model, hfprune.score(model, BATCHES), budget=Budget(mlp_ratio=1.0)))
    saved = hfprune.save(model, tmp_path / "model")
    assert saved["width"] == 16
    again = hfprune.load(tmp_path / "model")
    assert torch.equal(again(BATCHES[0]).logits, model(BATCHES[0]).logits)
    with pytest.raises(ConfigError, match="overwrite"):
        hfprune.save(model, tmp_path / "model")


def test_allocations():
    model = tiny("llama")
    scores = hfprune.score(model, BATCHES)
    ranked = hfprune.make_plan(model, scores, budget=0.1, allocation=GlobalRank())
    assert len(set(ranked.widths().values())) > 1
    explicit = hfprune.make_plan(model, scores, allocation=Explicit(mlp=[3, 4, 5]))
    assert list(explicit.widths().values()) == [3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget=... is missing"),
        ({"budget": 0.2}, "scores has no entry for model.layers.0.mlp"),
        ({"budget": 1.2}, "pruning_ratio"),
        ({"budget": 0.2, "keep": {}}, "remove budget, allocation and skip_layers"),
        ({"keep": {"model.layers.7.mlp": [1]}}, "keep has an unknown group 'model.layers.7.mlp'"),
        ({"budget": 0.2, "scores": {"other": torch.ones(3)}}, "scores has an unknown group 'other'"),
        (
            {"budget": 0.2, "scores": {f"model.layers.{i}.mlp": torch.ones(3) for i in range(3)}},
            r"\[3\], expected \[24\]",
        ),
        ({"budget": 0.2, "scores": {f"model.layers.{i}.mlp": torch.full((24,), torch.nan) for i in range(3)}}, "NaN"),
        ({"budget": 0.2, "allocation": Sensitivity()}, "pass curves"),
    ],
)
def test_plans_that_cannot_be_made(arguments, message):
    with pytest.raises(ConfigError, match=message):
        hfprune.make_plan(tiny("llama"), **arguments)


@pytest.mark.parametrize("units", [[], [24], [1, 1]])
def test_indices_that_are_not_units(units):
    with pytest.raises(PlanError, match=r"kept units of model.layers.0.mlp"):
        hfprune.make_plan(tiny("llama"), keep={"model.layers.0.mlp": units})


def test_scores_that_cannot_be_made():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="scores each layer after the previous layers were pruned"):
        hfprune.score(model, BATCHES, Reconstruction())
    with pytest.raises(ConfigError, match="takes no objective"):
        hfprune.score(model, BATCHES, Magnitude(), objective="entropy")
    with pytest.raises(CalibrationError):
        hfprune.score(model, [])


def test_names_are_listed_and_loaded_at_first_use():
    names = {"score", "make_plan", "apply_plan", "refit", "save", "load"}
    assert names <= set(dir(hfprune))
    assert names <= set(hfprune.__all__)
