"""Neurons described by their owner become groups; widths and counts follow from the matrices."""

import pytest
import torch
from torch import nn

from hfprune.models import Neurons, custom_groups, parameter_count, pruned_count
from hfprune.models.surgery import apply_plan, cut_optimizer_state, plan_cuts
from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))


CHAIN = [Neurons("0", "2"), Neurons("2", "4")]


def plan_for(model, groups, widths):
    keep = {g.name: tuple(range(w)) for g, w in zip(groups, widths, strict=True)}
    return PruningPlan(model_class=type(model).__name__, groups=groups, keep=keep, config={})


@pytest.mark.parametrize("widths", [(12, 7), (9, 7), (12, 2), (5, 3), (1, 1)])
def test_count_is_what_surgery_leaves(widths):
    model = mlp()
    groups = custom_groups(model, CHAIN)
    expected = pruned_count(model, groups, widths)
    apply_plan(model, plan_for(model, groups, widths))
    assert parameter_count(model) == expected
    assert model(torch.randn(2, 5)).shape == (2, 3)
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (widths[0], *widths)


def test_stars_pair_up():
    model = nn.ModuleDict({f"b{i}": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for i in range(3)})
    groups = custom_groups(model, [Neurons("*.up", "*.down")])
    assert [g.name for g in groups] == ["b0.down", "b1.down", "b2.down"]
    assert [s.module for g in groups for s in g.slices] == [f"b{i}.{m}" for i in range(3) for m in ("up", "down")]


def test_gated():
    model = nn.ModuleDict({"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    (group,) = custom_groups(model, [Neurons(["gate", "up"], "down")])
    assert [(s.module, s.side) for s in group.slices] == [("gate", "out"), ("up", "out"), ("down", "in")]


def test_a_star_without_counterpart_is_an_error():
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})})
    model["b"] = nn.ModuleDict({"down": nn.Linear(6, 4)})
    with pytest.raises(ConfigError, match=r"'b\.down' has no counterpart"):
        custom_groups(model, [Neurons("*.up", "*.down")])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_optimizer_states_are_cut_like_their_parameters(optimizer):
    model = mlp()
    trained = optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    model(torch.randn(4, 5)).square().sum().backward()
    trained.step()
    groups = custom_groups(model, CHAIN)
    plan = plan_for(model, groups, (5, 3))
    cuts = plan_cuts(model, plan)
    state = trained.state_dict()
    before = {i: dict(entry) for i, entry in state["state"].items()}
    lost = cut_optimizer_state(state, [(n, p.shape) for n, p in model.named_parameters()], cuts)
    if optimizer is torch.optim.Adafactor:
        assert lost == 3  # factored moments of the three cut matrices; vectors have plain ones
    else:
        assert lost == 0
        key = "exp_avg" if optimizer is torch.optim.AdamW else "momentum_buffer"
        assert torch.equal(state["state"][2][key], before[2][key][:3, :5])  # the matrix that two groups share
        assert torch.equal(state["state"][4][key], before[4][key])  # the last bias
    apply_plan(model, plan)
    again = optimizer(model.parameters(), lr=0.1)
    again.load_state_dict(state)
    model(torch.randn(4, 5)).square().sum().backward()
    again.step()  # every state fits its parameter
