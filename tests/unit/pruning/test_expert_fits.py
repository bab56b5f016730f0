"""Closed-form fits of experts that lost neurons, against least squares on activations of the loop."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune.cli import main
from hfprune.compensation import LeastSquares, MeanCompensation
from hfprune.criteria import Magnitude
from hfprune.models import backbone, config_values, find_groups
from hfprune.models.expert_neurons import within_expert
from hfprune.models.surgery import apply_plan
from hfprune.plan import PruningPlan
from hfprune.pruning.layerwise import LayerwisePass, check_together
from hfprune.utils.errors import ConfigError
from tests.helpers.models import inventory, save_tiny, tiny, token_ids
from tests.helpers.runs import TINY_FLAGS
from tests.reference.experts import block_of, by_hand, mixed_layers

BATCHES = [{"input_ids": token_ids(2, 6)}, {"input_ids": token_ids(1, 5, seed=1)}]
NAMES = ["mixtral", "deepseek_v3_groups", "gpt_oss", "llama4"]


def activations(model):
    """Returns (layer, expert) -> weighted outputs of the neurons of the expert at all tokens, 0 for other tokens."""
    found, start = {}, [0]
    total = sum(batch["input_ids"].numel() for batch in BATCHES)

    def inner(layer, token, e, values, weight):
        rows = found.setdefault((layer, e), torch.zeros(total, len(values), dtype=torch.float64))
        rows[start[0] + token] = (values * weight).detach()
        return values

    by_hand(model, inner=inner)
    with torch.no_grad():
        for batch in BATCHES:
            backbone(model)(input_ids=batch["input_ids"], use_cache=False)
            start[0] += batch["input_ids"].numel()
    for layer in mixed_layers(model):
        del block_of(model, model.model.layers[layer]).forward
    return found


def slow_pass(model, dense, groups, keep, *, damping, target):
    """Fits layer by layer, expert by expert: least squares on rows, with the ridge as further rows."""
    of_dense = activations(dense)
    for layer in sorted({g.layer for g in groups}):
        seen = activations(model)
        for g in (g for g in groups if g.layer == layer):
            e, kept = int(g.name.rsplit(".", 1)[1]), list(keep[g.name])
            stored = block_of(model, model.model.layers[layer]).experts.down_proj
            weight = stored.data[e] if model.config.model_type not in ("gpt_oss", "llama4_text") else stored.data[e].T
            w, fitted = weight.clone(), weight[:, kept].clone()
            if (layer, e) in seen:
                x = seen[layer, e]
                y = of_dense.get((layer, e), torch.zeros_like(x)) if target == "dense" else x
                ridge = (damping * x.square().sum(0).mean()).sqrt()
                eye = torch.eye(len(kept), dtype=torch.float64)
                left = torch.cat([x[:, kept], ridge * eye])
                right = torch.cat([y @ w.T, ridge * w[:, kept].T])
                fitted = torch.linalg.lstsq(left, right).solution.T
            weight.zero_()
            weight[:, kept] = fitted


def some(groups, width):
    torch.manual_seed(0)
    return {g.name: tuple(sorted(torch.randperm(g.num_units)[:width].tolist())) for g in groups}


@pytest.mark.parametrize("target", ["module", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_every_expert_is_fitted_to_its_own_tokens(name, target):
    model, slow = tiny(name), tiny(name)
    groups = tuple(g for g in find_groups(model, ("mlp",)) if within_expert(g))
    keep, compensation = some(groups, 8), LeastSquares(damping=0.1, target=target, tokens="equal")
    found = LayerwisePass(model, groups, compensation=compensation).run(BATCHES, {g.name: 8 for g in groups}, keep=keep)
    slow_pass(slow, tiny(name), groups, keep, damping=0.1, target=target)
    assert found.keep == keep
    for (parameter, value), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=2e-5, rtol=1e-5, msg=parameter)  # routers round to float32
    changed = [
        n for (n, p), q in zip(tiny(name).named_parameters(), model.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert changed == [n for n in changed if n.endswith("down_proj")] != []


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_fit_helps_the_pruned_model(name, monkeypatch):
    def hidden(model):
        with torch.no_grad():
            return [backbone(model)(input_ids=b["input_ids"]).last_hidden_state for b in BATCHES]

    results = []
    for limit in (2**27, 1):  # all experts of a layer in one pass, or one by one
        monkeypatch.setattr("hfprune.pruning.layerwise._MOMENTS", limit)
        fitted, plain = tiny(name), tiny(name)
        groups = find_groups(fitted, ("mlp",))
        keep, widths = some(groups, 9), {g.name: 9 for g in groups}
        fit = LeastSquares(damping=0.01, tokens="equal")
        LayerwisePass(fitted, groups, compensation=fit).run(BATCHES, widths, keep=keep)
        plan = PruningPlan(
            model_class=type(plain).__name__, groups=groups, keep=keep, config=config_values(plain, groups, keep)
        )
        for model in (fitted, plain):
            apply_plan(model, plan)
        dense = hidden(tiny(name))
        errors = [sum((a - b).square().sum() for a, b in zip(hidden(m), dense, strict=True)) for m in (fitted, plain)]
        assert errors[0] < 0.7 * errors[1]
        results.append(hidden(fitted))
    torch.testing.assert_close(*results)


def test_biases_of_experts_are_not_fitted():
    model = tiny("gpt_oss")
    stock = inventory(model, ("mlp",))
    with pytest.raises(ConfigError, match="MeanCompensation requires projections with a bias"):
        check_together(Magnitude(), MeanCompensation(), ("mlp",), None, stock, model=model)


def test_a_run_of_the_default_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "dense", "deepseek_v2")
    assert main(["prune", f"--model.path={folder}", *TINY_FLAGS, "--pruning_ratio=0.1", "--output_dir=out"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert report["plan"]["budget"]["width"] == model.config.moe_intermediate_size < 12
    assert report["saved"]["max_logit_difference_after_reload"] < 1e-5
