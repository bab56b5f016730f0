"""Neurons within experts: cuts of stacked weights, masks, costs, configs, scores, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfprune
from hfprune.allocation import Explicit, GlobalRank, allocate
from hfprune.callbacks import LoraPruningCallback
from hfprune.cli import main
from hfprune.criteria import ActivationNorm, ActivationTaylor, CoupledTaylor, Magnitude, Reap, VectorTaylor
from hfprune.models import check_stock, config_values, find_groups, find_spec, parameter_count, unit_cost
from hfprune.models.expert_neurons import within_expert
from hfprune.models.surgery import apply_plan, cut_optimizer_state, mask_plan, plan_cuts
from hfprune.modules import PruningModule
from hfprune.plan import Budget, PruningPlan
from hfprune.pruning.accumulator import check_criterion, weight_scores
from hfprune.pruning.hooks import UnitMask
from hfprune.utils.errors import ConfigError, PlanError, UnsupportedArchitectureError
from tests.helpers.models import MIXTURE_CLASSES, MIXTURES, inventory, save_tiny, tiny, token_ids
from tests.helpers.runs import TINY_FLAGS
from tests.helpers.toys import calibrate, check
from tests.reference import taylor as slow
from tests.reference.experts import block_of, by_hand, mixed_layers, neuron_worth, without_neurons

LENGTHS = (6, 4)
SCORED = [
    pytest.param(
        name, marks=() if name in ("qwen2_moe", "deepseek_v3_groups", "gpt_oss", "llama4") else pytest.mark.slow
    )
    for name in MIXTURES
]
"""Each way in which experts store weights and receive router weights; the other classes are slow tests."""


def sequences():
    return [token_ids(1, n, seed=n)[0] for n in LENGTHS]


def plan_of(model, widths, units=("mlp",), *, seed=0, layers=(0, 1, 2)):
    """Returns a plan that keeps random neurons in each expert: ``widths`` of each layer."""
    generator, keep = torch.Generator().manual_seed(seed), {}
    groups = find_groups(model, units)
    for g in groups:
        order = torch.randperm(g.num_units, generator=generator)
        keep[g.name] = layers if g.kind == "layers" else tuple(order[: widths[g.layer]].tolist())
    config = config_values(model, groups, keep)
    return PruningPlan(model_class=type(model).__name__, groups=groups, keep=keep, config=config)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


def expert_of(group):
    return int(group.name.rsplit(".", 1)[1])


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_pruned_is_masked_is_the_loop_without_the_neurons(name):
    model, pruned, masked, ids = tiny(name), tiny(name), tiny(name), token_ids(2, 5)
    plan = plan_of(model, (7, 5, 9))
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(pruned, ids), logits(masked, ids), atol=1e-10, rtol=0)
    loop, kept = tiny(name), {}
    for group in plan.groups:
        if within_expert(group):
            kept.setdefault(group.layer, {})[expert_of(group)] = set(plan.keep[group.name])
        else:  # a shared expert as wide as one or two experts
            down = loop.get_submodule(f"{group.name}.down_proj").weight
            with torch.no_grad():
                down[:, group.inputs()[0].channels(plan.removed(group))] = 0
    torch.testing.assert_close(logits(pruned, ids), logits(without_neurons(loop, kept), ids), atol=1e-5, rtol=0)
    mask = UnitMask(model, plan.groups, plan.keep)
    before = logits(model, ids)
    with mask.active():
        torch.testing.assert_close(logits(model, ids), logits(pruned, ids), atol=1e-10, rtol=0)
        with mask.lifted():
            assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    assert (before - logits(pruned, ids)).abs().max() > 1e-3
    gone = sum(len(plan.removed(g)) * unit_cost(model, g) for g in plan.groups)
    assert parameter_count(model) - parameter_count(pruned) == gone
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_stock_transformers_loads_one_width(name, tmp_path):
    model, masked, ids = tiny(name, dtype=torch.float32), tiny(name, dtype=torch.float32), token_ids(1, 5)
    plan = plan_of(model, (7, 7, 7), ("mlp", "layers"), layers=(0, 2))
    check_stock(model, plan.groups, plan.keep)
    hfprune.apply_plan(model, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())[find_spec(model).width_key] == 7
    found = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, loaded)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3_groups", "gpt_oss", "llama4"])
def test_other_widths_per_layer_need_a_layout(name, tmp_path):
    model = tiny(name, dtype=torch.float32)
    plan = plan_of(model, (9, 7, 5))
    with pytest.raises(UnsupportedArchitectureError, match="different numbers of MLP neurons"):
        check_stock(model, plan.groups, plan.keep)
    hfprune.apply_plan(model, plan)
    with pytest.raises(ConfigError, match="cannot replace removed mlp"):
        hfprune.io.layouts.LAYOUTS.get("padded").check(model)
    model.save_pretrained(tmp_path)
    loaded = hfprune.load(tmp_path)
    if name != "llama4":
        loaded.set_experts_implementation("eager")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_budgets_are_exact(name):
    model = tiny(name)
    stock = inventory(model, ("mlp",))
    dense = stock.groups[0].num_units
    step = {24: 8, 12: 4}[dense]  # rows of grouped matrix products: a multiple of 16 bytes
    width = 2 * step
    found = allocate(stock, Budget(intermediate_size=width))
    assert set(found.widths) == {width}
    assert (found.width, found.dense_width) == (width, dense)
    plan = plan_of(model, (width,) * 3)
    apply_plan(model, plan)
    assert parameter_count(model) == found.params
    assert set(allocate(stock, Budget(intermediate_size=width - 1)).widths) == {width}
    assert set(allocate(stock, Budget(allocated=True), Explicit(mlp=step)).widths) == {step}
    with pytest.raises(ConfigError, match=f"would keep {step + 1} neurons.* need multiples of {step}"):
        allocate(stock, Budget(allocated=True), Explicit(mlp=step + 1))
    assert set(allocate(stock, Budget(pruning_ratio=0.3, round_to=4)).widths) <= {4, 8, 12, 16, 20}


def test_one_ranking_removes_whole_ranks_of_neurons():
    model = tiny("mixtral")
    stock = inventory(model, ("mlp",))
    scores = {g.name: torch.arange(24.0).roll(expert_of(g)) + 8 * g.layer for g in stock.groups}
    target = stock.dense_params - 24 * 6 * stock.costs[0]
    found = allocate(stock, Budget(target_params=target), GlobalRank(floor=0.0, comparable="none"), scores=scores)
    by_layer = {
        layer: {w for g, w in zip(stock.groups, found.widths, strict=True) if g.layer == layer} for layer in range(3)
    }
    assert all(len(widths) == 1 for widths in by_layer.values())
    assert [min(by_layer[layer]) for layer in range(3)] == [8, 16, 24]
    assert found.params == target


def worth_of(model, objective):
    return neuron_worth(model, sequences(), slow.objective_of(objective))


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_of_the_loop(name):
    model = tiny(name)
    groups = [g for g in find_groups(model, ("mlp",)) if within_expert(g)]
    worth, batches = worth_of(tiny(name), "entropy"), [{"input_ids": ids[None]} for ids in sequences()]

    def expected(form):
        found = {}
        for g in groups:
            rows = [seen[g.layer, expert_of(g)] for seen in worth if (g.layer, expert_of(g)) in seen]
            total = sum(form(values, grads) for values, grads in rows) if rows else torch.zeros(g.num_units)
            found[g.name] = total.double() / sum(LENGTHS)
        return found

    taylor = expected(lambda values, grads: (values * grads).abs().sum(0))
    norms = {key: value.sqrt() for key, value in expected(lambda values, grads: values.square().sum(0)).items()}
    for implementation in ("eager", "batched_mm")[: 1 if name == "llama4" else 2]:
        model.set_experts_implementation(implementation)
        found = calibrate(model, ActivationTaylor(), "entropy", groups=groups, batches=batches)
        check(found, {k: v.tolist() for k, v in taylor.items()}, rtol=1e-4, share=1e-5)
        with pytest.raises(AssertionError):  # without the gradient
            check(found, {k: v.tolist() for k, v in norms.items()}, rtol=1e-2)
        found = calibrate(model, ActivationNorm(), groups=groups, batches=batches)
        check(found, {k: v.tolist() for k, v in norms.items()}, rtol=1e-4, share=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_magnitudes_are_those_of_the_weights_of_a_neuron(name):
    model = tiny(name)
    groups = [g for g in find_groups(model, ("mlp",)) if within_expert(g)]
    found = weight_scores(model, groups, Magnitude())
    for g in groups:
        e, experts = expert_of(g), block_of(model, model.model.layers[g.layer]).experts
        gate_up = experts.gate_up_proj[e] if name == "mixtral" else experts.gate_up_proj[e].T
        down = experts.down_proj[e] if name == "mixtral" else experts.down_proj[e].T
        for j in range(g.num_units):
            pair = (2 * j, 2 * j + 1) if name == "gpt_oss" else (j, g.num_units + j)
            total = gate_up[list(pair)].square().sum() + down[:, j].square().sum()
            assert float(found[g.name][j]) == pytest.approx(float(total.detach().sqrt()), rel=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_training_goes_on_with_what_survives(name):
    model = tiny(name)
    trained = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained.step()
    plan = plan_of(model, (7, 5, 9))
    cuts, order = plan_cuts(model, plan), list(model.named_parameters())
    moments, state = {n: trained.state[p]["exp_avg"] for n, p in order}, trained.state_dict()
    assert cut_optimizer_state(state, [(n, p.shape) for n, p in order], cuts) == 0
    apply_plan(model, plan)
    again = torch.optim.AdamW(model.parameters(), lr=1e-3)
    again.load_state_dict(state)
    for g in plan.groups:
        e, kept = expert_of(g), list(plan.keep[g.name])
        full = f"{g.name.rsplit('.', 1)[0]}.down_proj"
        old = moments[full][e] if name == "mixtral" else moments[full][e].T
        new = again.state[model.get_parameter(full)]["exp_avg"][e]
        assert torch.equal(new if name == "mixtral" else new.T, old[:, kept])
    again.step()


def test_experts_first_and_then_neurons():
    model = tiny("deepseek_v3_groups")
    groups = find_groups(model, ("experts",))
    keep = {g.name: (0, 2) for g in groups}
    apply_plan(model, PruningPlan(model_class=type(model).__name__, groups=groups, keep=keep, config={}))
    masked = tiny("deepseek_v3_groups")
    apply_plan(masked, PruningPlan(model_class=type(model).__name__, groups=groups, keep=keep, config={}))
    plan = plan_of(model, (7, 7, 7))
    assert len(plan.groups) == len(mixed_layers(model)) * (4 + 1)
    apply_plan(model, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-10, rtol=0)


def test_what_neurons_within_experts_cannot_do():
    model = tiny("mixtral")
    with pytest.raises(UnsupportedArchitectureError, match="One plan cannot remove experts and the neurons within"):
        find_groups(model, ("mlp", "experts"))
    groups = find_groups(model, ("mlp",))
    keep = {g.name: range(7 + (expert_of(g) == 2)) for g in groups}
    before = parameter_count(model)
    with pytest.raises(PlanError, match="6 groups of mlp in layer 0 must keep equal numbers of units.*7 to 8"):
        apply_plan(model, PruningPlan(model_class="MixtralForCausalLM", groups=groups, keep=keep, config={}))
    assert parameter_count(model) == before
    for criterion in (VectorTaylor(), CoupledTaylor()):
        with pytest.raises(ConfigError, match="reads gate and up projections, which are part of one tensor"):
            check_criterion(model, groups, criterion)
    with pytest.raises(ConfigError, match="Reap scores experts"):
        check_criterion(model, groups, Reap())


def test_an_expert_without_tokens_does_not_stop_the_run():
    model, ids = tiny("mixtral"), token_ids(1, 2)
    groups = find_groups(model, ("mlp",))
    found = calibrate(model, ActivationNorm(), groups=groups, batches=[{"input_ids": ids}])
    idle = [g for g in groups if not bool(found[g.name].any())]
    norms = {g.layer: [] for g in groups}
    by_hand(tiny("mixtral"), norms=norms)(input_ids=ids)
    used = {(layer, e) for layer, tokens in norms.items() for token in tokens for e in token}
    assert idle
    assert {(g.layer, expert_of(g)) for g in idle} == {(g.layer, expert_of(g)) for g in groups} - used


def test_adapters_do_not_score_neurons_within_experts(tmp_path):
    module = PruningModule(save_tiny(tmp_path, "mixtral"))
    with pytest.raises(ConfigError, match="neurons within experts do not have: use units="):
        LoraPruningCallback(pruning_ratio=0.2, units=("mlp",)).check(module)


def test_a_command_that_cannot_score_neurons_within_experts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "dense", "qwen3_moe")
    flags = ["--importance.criterion=VectorTaylor", "--pruning_ratio=0.2", "--output_dir=other"]
    assert main(["prune", f"--model.path={folder}", *TINY_FLAGS, *flags]) == 2
    assert "part of one tensor in experts" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()
