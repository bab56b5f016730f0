"""Sensitivity curves: equal to KL of models that are masked one group at a time, and spent as a run says."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.allocation import CosineSoftmax, Protected, Sensitivity, keep_top
from hfprune.criteria import ActivationNorm, Reconstruction
from hfprune.models import class_name, find_groups
from hfprune.models.forward import sequences
from hfprune.models.surgery import mask_plan
from hfprune.plan import PruningPlan
from hfprune.pruning.layer_scores import layer_cosines
from hfprune.pruning.sensitivity_curves import kl_curves
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.models import save_tiny, tiny, token_ids

SHARES = (0.75, 0.25)


def masked_kl(model, group, kept, batches):
    """The same by the plain road: a copy with zeroed weights, whole logits in float64."""
    copied = copy.deepcopy(model)
    keep = {group.name: tuple(kept)}
    mask_plan(copied, PruningPlan(model_class=class_name(model), groups=(group,), keep=keep, config={}))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.log_softmax(-1) for m in (model, copied))
            total += float((p.exp() * (p - q)).sum())
            tokens += batch["input_ids"].numel()
    return total / tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_curves_are_the_kl_of_masked_models(name):
    model = tiny(name).train()
    units = ("experts",) if name == "mixtral" else ("mlp", "heads")
    groups = find_groups(model, units)
    batches = [{"input_ids": token_ids(2, 7, seed=seed)} for seed in range(2)]
    scores = {group.name: torch.rand(group.num_units, dtype=torch.float64) for group in groups}
    found = kl_curves(model, groups, scores, batches, SHARES)
    assert model.training
    model.eval()
    assert list(found) == [group.name for group in groups]
    for group in groups:
        for share, kl in found[group.name].items():
            kept = keep_top(scores[group.name], round(share * group.num_units))
            assert kl == pytest.approx(masked_kl(model, group, kept, batches), rel=1e-9)
            assert (kl > 0) == (len(kept) < group.num_units)


def test_layers_before_a_group_are_run_once():
    model = tiny().eval()
    groups = find_groups(model)
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    batches = [{"input_ids": token_ids(2, 7)}]  # two sequences, one by one
    ran = [0, 0, 0]

    def count(index):
        def hook(*_):
            ran[index] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(index))
    kl_curves(model, groups, scores, batches, SHARES)
    # the dense pass, then two shares each of the groups up to the layer, and once on the way to the next layer's group
    assert ran == [2 * (1 + 2 + 1), 2 * (1 + 4 + 1), 2 * (1 + 6)]
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_no_tokens_and_no_finite_kl_are_errors():
    model = tiny().eval()
    groups = find_groups(model)
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    with pytest.raises(CalibrationError, match="empty"):
        kl_curves(model, groups, scores, [], SHARES)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.inf
    with pytest.raises(CalibrationError, match="the KL to the dense model is nan"):
        kl_curves(model, groups, scores, [{"input_ids": token_ids(1, 5)}], SHARES)


def prune(folder, **options):
    importance = TaylorImportanceCallback(**{"pruning_ratio": 0.2, "criterion": ActivationNorm()} | options)
    trainer = PruneTrainer(
        callbacks=[importance], accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    module = PruningModule(folder)
    trainer.prune(module, TextDataModule(seq_len=16, calibration_sequences=5, eval_windows=0))
    return module, importance


def test_a_run_measures_its_own_curves(tmp_path):
    """What it measured and what it left are those of a run that is given the curves."""
    folder = save_tiny(tmp_path / "dense")
    module, importance = prune(folder, allocation=Sensitivity(shares=SHARES, sequences=3))
    said = module.plan.provenance["allocation"]
    assert said["shares"] == list(SHARES)
    assert said["sequences"] == 3
    assert set(said["curves"]) == {group.name for group in module.plan.groups}
    assert len(set(importance.resolved.widths)) > 1
    assert importance.resolved.asked == "pruning_ratio=0.2, Sensitivity(shares=[0.75, 0.25], sequences=3)"
    curves = {name: {float(share): kl for share, kl in curve.items()} for name, curve in said["curves"].items()}
    again, _ = prune(folder, allocation=Sensitivity(curves))
    assert again.plan.keep == module.plan.keep


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("mlp", "layers")}, "cannot remove whole layers"),
        ({"criterion": Reconstruction()}, "needs all scores"),
    ],
)
def test_what_it_does_not_go_with(tmp_path, options, message):
    folder = save_tiny(tmp_path / "dense")
    with pytest.raises(ConfigError, match=message):
        prune(folder, allocation=Sensitivity(), **options)


def test_a_run_measures_its_own_cosines(tmp_path):
    """The cosines are those of ``layer_cosines`` on the same sequences, and a run that is given them keeps the same."""
    folder = save_tiny(tmp_path / "dense")
    module, importance = prune(folder, allocation=CosineSoftmax(alpha=40.0, sequences=3))
    said = module.plan.provenance["allocation"]
    assert said | {"cosines": None} == {
        "name": "CosineSoftmax", "alpha": 40.0, "sequences": 3, "cosines": None
    }  # fmt: skip
    assert importance.resolved.asked == "pruning_ratio=0.2, CosineSoftmax(alpha=40.0, sequences=3)"
    assert len(set(importance.resolved.widths)) > 1
    assert importance.resolved.params == pytest.approx(importance.resolved.target_params, rel=0.01)
    cosines = {int(layer): value for layer, value in said["cosines"].items()}
    again, _ = prune(folder, allocation=CosineSoftmax(cosines, alpha=40.0))
    assert again.plan.keep == module.plan.keep

    data = TextDataModule(seq_len=16, calibration_sequences=5, eval_windows=0)
    again_callback = TaylorImportanceCallback(pruning_ratio=0.2, criterion=ActivationNorm())
    PruneTrainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
                 enable_model_summary=False, callbacks=[again_callback]).prune(PruningModule(folder), data)  # fmt: skip
    first = [sequence for batch in data.calibration_dataloader() for sequence in sequences(batch)][:3]
    expected = layer_cosines(AutoModelForCausalLM.from_pretrained(folder).eval(), first)
    assert list(cosines.values()) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequences": 0}, "sequences=0 must be at least 1"),
        ({"num_layers": 0}, "num_layers=0 must be from 1"),
    ],
)
def test_cosine_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        CosineSoftmax(**settings)


def test_more_layers_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_layers=4 must be from 1 to 3"):
        prune(save_tiny(tmp_path / "dense"), allocation=CosineSoftmax(num_layers=4))


def test_within_another_allocation_it_needs_curves():
    with pytest.raises(ConfigError, match="Sensitivity cannot measure within Protected. Give it its curves"):
        Protected(allocation=Sensitivity())
    with pytest.raises(ConfigError, match="CosineSoftmax cannot measure within Protected"):
        Protected(allocation=CosineSoftmax())


@pytest.mark.parametrize("settings", [{"shares": ()}, {"shares": (1.0,)}, {"sequences": 0}])
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match="Sensitivity: shares"):
        Sensitivity(**settings)
