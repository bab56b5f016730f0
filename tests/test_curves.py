"""Sensitivity curves: equal to KL of models that are masked one group at a time, and spent as a run says."""

import copy

import pytest
import torch

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.allocation import Protected, Sensitivity, keep_top
from hfprune.arch import find_groups
from hfprune.compensation import LeastSquares
from hfprune.criteria import ActivationNorm, Reconstruction
from hfprune.curves import Fitted, kl_curves
from hfprune.errors import CalibrationError, ConfigError
from hfprune.layerwise import LayerwisePass
from hfprune.plan import PruningPlan
from hfprune.surgery import mask_plan
from tests.models import save_tiny, tiny, token_ids

SHARES = (0.75, 0.25)


def masked_kl(model, group, kept, batches):
    """The same by the plain road: a copy with zeroed weights, whole logits in float64."""
    copied = copy.deepcopy(model)
    keep = {group.name: tuple(kept)}
    mask_plan(copied, PruningPlan(model_class="LlamaForCausalLM", groups=(group,), keep=keep, config={}))
    return plain_kl(model, copied, batches)


def fitted_kl(model, group, kept, batches, calibration, damping):
    """The same for weights that solve the normal equations of the dense model's inputs, each token weighed by 1 over
    the mean square of its layer's output."""
    copied = copy.deepcopy(model)
    (part,) = group.inputs()
    module, layer = (copied.get_submodule(n) for n in (part.module, ".".join(part.module.split(".")[:3])))
    inputs, outputs = [], []
    handles = [
        module.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1))),
        layer.register_forward_hook(
            lambda m, a, o: outputs.append((o[0] if isinstance(o, tuple) else o).flatten(0, 1))
        ),
    ]
    with torch.no_grad():
        for batch in calibration:
            copied(**batch)
        for handle in handles:
            handle.remove()
        x = torch.cat(inputs) / torch.cat(outputs).square().mean(-1, keepdim=True).sqrt()
        w, channels = module.weight, part.channels(kept)
        ridge = damping * x.square().sum(0).mean() * torch.eye(len(channels), dtype=x.dtype)
        a = x[:, channels]
        solved = torch.linalg.solve(a.T @ a + ridge, a.T @ (x @ w.T) + ridge @ w[:, channels].T)
        w.zero_()
        w[:, channels] = solved.T
    return plain_kl(model, copied, batches)


def plain_kl(model, copied, batches):
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.log_softmax(-1) for m in (model, copied))
            total += float((p.exp() * (p - q)).sum())
            tokens += batch["input_ids"].numel()
    return total / tokens


def test_curves_are_the_kl_of_masked_models():
    model = tiny().train()
    groups = find_groups(model, ("mlp", "heads"))
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


def test_fitted_curves_are_the_kl_of_models_fitted_one_group_at_a_time():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    groups = find_groups(model, ("mlp", "heads"))
    batches = [{"input_ids": token_ids(2, 7, seed=seed)} for seed in range(2)]
    calibration = [{"input_ids": token_ids(3, 9, seed=seed)} for seed in range(5, 9)]
    scores = {group.name: torch.rand(group.num_units, dtype=torch.float64) for group in groups}
    work = LayerwisePass(model, groups, compensation=LeastSquares(damping=0.05))
    fitted = Fitted(work=work, batches=calibration)
    found = kl_curves(model, groups, scores, batches, SHARES, fitted=fitted)
    plain = kl_curves(model, groups, scores, batches, SHARES)
    assert list(found) == [group.name for group in groups]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for group in groups:
        for share, kl in found[group.name].items():
            kept = keep_top(scores[group.name], round(share * group.num_units))
            assert kl == pytest.approx(fitted_kl(model, group, kept, batches, calibration, 0.05), rel=1e-7)
            assert kl != pytest.approx(plain[group.name][share], rel=1e-3)


def test_fitted_curves_see_the_fit_under_mixed_precision():
    """Autocast would go on with its rounded copy of the dense weights."""
    model = tiny(dtype=torch.float32)
    groups = find_groups(model)
    batches = [{"input_ids": token_ids(2, 7)}]
    scores = {group.name: torch.rand(group.num_units) for group in groups}

    def curves():
        work = LayerwisePass(model, groups, compensation=LeastSquares())
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return kl_curves(model, groups, scores, batches, SHARES, fitted=Fitted(work=work, batches=batches))

    trainable = curves()
    model.requires_grad_(requires_grad=False)
    assert trainable == curves()
    assert all(kl > 0 for curve in trainable.values() for kl in curve.values())


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
        ({"units": ("mlp", "blocks")}, "does not say which whole layers go"),
        ({"criterion": Reconstruction()}, "needs all scores"),
    ],
)
def test_what_it_does_not_go_with(tmp_path, options, message):
    folder = save_tiny(tmp_path / "dense")
    with pytest.raises(ConfigError, match=message):
        prune(folder, allocation=Sensitivity(), **options)


def test_curves_are_measured_as_the_run_will_fit(tmp_path):
    """Unless it is told not to; without a compensation there is nothing to fit."""
    folder = save_tiny(tmp_path / "dense")

    def curves(**settings):
        compensation = settings.pop("compensation", None)
        module, _ = prune(folder, allocation=Sensitivity(shares=(0.5,), **settings), compensation=compensation)
        return module.plan.provenance["allocation"]["curves"]

    assert curves(compensation=LeastSquares()) != curves(compensation=LeastSquares(), fitted=False) == curves()


def test_within_another_allocation_it_needs_curves():
    with pytest.raises(ConfigError, match="give Sensitivity its curves"):
        Protected(allocation=Sensitivity())


@pytest.mark.parametrize("settings", [{"shares": ()}, {"shares": (1.0,)}, {"sequences": 0}])
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match="Sensitivity: shares"):
        Sensitivity(**settings)
