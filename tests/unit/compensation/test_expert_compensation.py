"""Merging and fits of kept experts, against loops over tokens and experts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune.cli import main
from hfprune.compensation import ExpertCompensation, ExpertLeastSquares, LeastSquares, MergeExperts
from hfprune.criteria import Magnitude
from hfprune.models import backbone, find_groups
from hfprune.pruning.expert_pass import ExpertPass
from hfprune.pruning.layerwise import check_together
from hfprune.utils.errors import ConfigError
from tests.helpers.models import own_units, save_tiny, tiny, token_ids
from tests.helpers.runs import TINY_FLAGS
from tests.reference.experts import block_of, by_hand, mixed_layers, mixture, route, router_of, shared

BATCHES = [{"input_ids": token_ids(2, 6)}, {"input_ids": token_ids(1, 5, seed=1)}]
NAMES = ["mixtral", "deepseek_v3_groups", "gpt_oss", "llama4"]
KEEP = ((0, 2, 3, 5), (1, 2, 4, 5), (0, 1, 3, 4))
REMOVED = [sorted(set(range(6)) - set(kept)) for kept in KEEP]
STACKS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


class Nothing(ExpertCompensation):
    def compensate(self, experts, keep, sweep, reduce):
        pass


def compensated(name, compensation):
    model = tiny(name)
    groups = find_groups(model, ("experts",))
    keep = {g.name: own_units(g, KEEP[g.layer]) for g in groups}
    return model, ExpertPass(model, groups, compensation).run(BATCHES, keep)


def inputs_of(model, layer):
    """Inputs [N, H] of the mixture of one layer, with the routers of earlier layers restricted."""
    by_hand(model, removed=[REMOVED[i] if i < layer else () for i in range(3)])
    found = []
    block = block_of(model, model.model.layers[layer])
    handle = block.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in BATCHES:
            backbone(model)(input_ids=batch["input_ids"], use_cache=False)
    handle.remove()
    return torch.cat(found)


def routed_output(block, x, **others):
    with torch.no_grad():
        return mixture(block, x, **others) - torch.stack([shared(block, t) + torch.zeros_like(t) for t in x])


def slow_merge(model):
    for layer in mixed_layers(model):
        x, block = inputs_of(model, layer), block_of(model, model.model.layers[layer])
        router, experts, used = router_of(block), block.experts, [0] * 6
        with torch.no_grad():
            logits = x @ router.weight.T + (router.bias if model.config.model_type == "gpt_oss" else 0.0)
            for token in x:
                for e in route(router, token, config=model.config):
                    used[e] += 1
        joined = {kept: [kept] for kept in KEEP[layer]}
        for e in REMOVED[layer]:
            alike = {k: float(torch.cosine_similarity(logits[:, e], logits[:, k], dim=0)) for k in KEEP[layer]}
            joined[max(alike, key=alike.get)].append(e)
        for kept, members in joined.items():
            total = sum(used[e] for e in members)
            for stack in (getattr(experts, s) for s in STACKS if hasattr(experts, s)):
                if total:
                    stack.data[kept] = sum(used[e] / total * stack.data[e].clone() for e in members)
    return model


def activations(block, x, *, config, removed):
    rows = {}

    def inner(token, e, values, weight):
        rows.setdefault(e, torch.zeros(len(x), len(values), dtype=torch.float64))[token] = (values * weight).detach()
        return values

    out = mixture(block, x, config=config, removed=removed, neurons=inner)
    return rows, out.detach()


def slow_fit(model, damping):
    errors = {}
    for layer in mixed_layers(model):
        x, block = inputs_of(model, layer), block_of(model, model.model.layers[layer])
        dense = routed_output(block, x, config=model.config)
        rows, _ = activations(block, x, config=model.config, removed=REMOVED[layer])
        residual = dense - routed_output(block, x, config=model.config, removed=REMOVED[layer])
        steps = {}
        for e, a in rows.items():
            ridge = (damping * a.square().sum(0).mean()).sqrt()
            left = torch.cat([a, ridge * torch.eye(a.shape[1], dtype=torch.float64)])
            right = torch.cat([residual, torch.zeros(a.shape[1], x.shape[1], dtype=torch.float64)])
            steps[e] = torch.linalg.lstsq(left, right).solution.T
        change = sum(a @ steps[e].T for e, a in rows.items())
        scale = (residual * change).sum() / change.square().sum()
        for e, step in steps.items():
            stored = block.experts.down_proj.data[e]
            stored += scale * (step.T if model.config.model_type in ("gpt_oss", "llama4_text") else step)
        left = dense - routed_output(block, x, config=model.config, removed=REMOVED[layer])
        errors[layer] = float(left.square().sum() / dense.square().sum())
    return model, errors


def close(found, expected):
    for (name, value), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=5e-5, rtol=1e-5, msg=name)  # routers round to float32


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_the_average_weighted_by_use(name):
    model, _ = compensated(name, MergeExperts())
    close(model, slow_merge(tiny(name)))
    with pytest.raises(AssertionError):
        close(model, tiny(name))
    for layer in mixed_layers(model):  # kept experts alone change
        now, before = (block_of(m, m.model.layers[layer]).experts.down_proj for m in (model, tiny(name)))
        assert torch.equal(now[REMOVED[layer]], before[REMOVED[layer]])


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_least_squares_on_the_residual(name):
    model, found = compensated(name, ExpertLeastSquares(damping=0.1))
    slow, errors = slow_fit(tiny(name), 0.1)
    close(model, slow)
    groups = find_groups(model, ("experts",))
    assert [found[g.name] for g in groups] == pytest.approx([errors[g.layer] for g in groups], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_the_first_layer_never_rises(name):
    _, plain = compensated(name, Nothing())
    first = next(iter(plain))
    for damping in (1e-3, 0.1, 10.0):
        _, fitted = compensated(name, ExpertLeastSquares(damping=damping))
        assert fitted[first] < plain[first]


def test_compensation_and_units_must_fit():
    model = tiny("mixtral")
    for compensation in (MergeExperts(), ExpertLeastSquares()):
        for units in (("mlp",), ("experts", "heads")):
            with pytest.raises(ConfigError, match=r"compensates for removed experts only: use units=\['experts'\]"):
                check_together(Magnitude(), compensation, units, None, None, model=model)
        check_together(Magnitude(), compensation, ("experts",), None, None, model=model)
        with pytest.raises(ConfigError, match="compensates for removed experts only"):
            compensation.fit(None, None, None, None)
    with pytest.raises(ConfigError, match="MergeExperts and ExpertLeastSquares compensate for them"):
        check_together(Magnitude(), LeastSquares(), ("experts",), None, None, model=model)
    with pytest.raises(ConfigError, match="damping=0 must be positive"):
        ExpertLeastSquares(damping=0)


@pytest.mark.parametrize("compensation", ["ExpertLeastSquares", pytest.param("MergeExperts", marks=pytest.mark.slow)])
def test_a_run_of_the_command_line(compensation, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "dense", "deepseek_v3_groups")
    flags = ["--importance.units=[experts]", "--importance.criterion=Reap", f"--importance.compensation={compensation}"]
    common = ["prune", f"--model.path={folder}", *TINY_FLAGS, "--pruning_ratio=0.14"]
    assert main([*common, *flags, "--output_dir=out"]) == 0
    plan = json.loads((tmp_path / "out" / "model" / "plan.json").read_text())
    assert plan["provenance"]["compensation"]["name"] == compensation
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.n_routed_experts == 4
    assert main([*common, f"--importance.compensation={compensation}", "--output_dir=other"]) == 2
    assert "compensates for removed experts only" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()
