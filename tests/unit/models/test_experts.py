"""Experts of mixtures as units: masks, costs, configs, layouts, a run, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

import hfprune
from hfprune.allocation import Explicit, GlobalRank, Sensitivity, Uniform, allocate
from hfprune.callbacks.checks import check_strategy
from hfprune.callbacks.user_module import find_target
from hfprune.cli import main
from hfprune.criteria import ActivationTaylor, Magnitude, scored_groups
from hfprune.evaluation.evaluate import measure
from hfprune.models import check_stock, config_values, find_groups, find_spec, head_counts, parameter_count, unit_cost
from hfprune.models.surgery import apply_plan, cut_optimizer_state, mask_plan, plan_cuts
from hfprune.modules import PruningModule
from hfprune.plan import Budget, PruningPlan
from hfprune.pruning.hooks import UnitMask
from hfprune.sparse import Sparsity, sparse_method
from hfprune.sparse.engine import check_sparse
from hfprune.utils.errors import ConfigError, PlanError, UnsupportedArchitectureError
from tests.helpers.models import (
    GROUPED,
    HEADED_MIXTURES,
    MIXTURE_CLASSES,
    inventory,
    mixtures,
    own_units,
    save_tiny,
    tiny,
    token_ids,
)
from tests.helpers.runs import TINY_FLAGS
from tests.reference.experts import block_of, by_hand, mixed_layers, router_of

KEEP = ((0, 2, 3, 5), (1, 2, 4, 5), (0, 1, 3, 4))
UNEVEN = ((0, 2, 3, 5), (1, 2), (0, 1, 2, 3, 4))
UNEVEN_GROUPS = ((0, 2, 3, 5), tuple(range(6)), (0, 1, 3, 4))
"""Kept experts for routers with two groups of three experts: equally many in each group."""


def uneven(name):
    return UNEVEN_GROUPS if name in GROUPED else UNEVEN


def plan_of(model, keep=KEEP, units=("experts",), **others):
    groups = find_groups(model, units)
    kept = {g.name: own_units(g, keep[g.layer]) if g.kind == "experts" else others[g.kind] for g in groups}
    config = config_values(model, groups, kept)
    return PruningPlan(model_class=type(model).__name__, groups=groups, keep=kept, config=config)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_pruned_is_the_dense_model_whose_routers_cannot_choose_what_went(name, even):
    model, pruned, masked = tiny(name), tiny(name), tiny(name)
    keep = KEEP if even else uneven(name)
    removed = [sorted(set(range(6)) - set(kept)) for kept in keep]
    ids = token_ids(2, 5)
    plan = plan_of(model, keep)
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    expected = logits(by_hand(copy.deepcopy(model), removed=removed), ids)
    torch.testing.assert_close(logits(pruned, ids), expected, atol=1e-5, rtol=0)  # routers round to float32
    torch.testing.assert_close(logits(masked, ids), logits(pruned, ids), atol=1e-10, rtol=0)
    mask = UnitMask(model, plan.groups, plan.keep)
    with mask.active():
        torch.testing.assert_close(logits(model, ids), logits(pruned, ids), atol=1e-10, rtol=0)
        with mask.lifted():
            torch.testing.assert_close(logits(model, ids), logits(by_hand(tiny(name)), ids), atol=1e-5, rtol=0)
    assert (logits(model, ids) - expected).abs().max() > 1e-3
    gone = sum(len(removed[layer]) for layer in mixed_layers(model))
    assert parameter_count(model) - parameter_count(pruned) == gone * unit_cost(model, plan.groups[0])
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_experts_heads_and_layers_together(name):
    pruned, masked = tiny(name), tiny(name)
    units = ("experts", "heads", "layers") if name in HEADED_MIXTURES else ("experts", "layers")
    plan = plan_of(pruned, uneven(name), units, heads=(1,), layers=(0, 2))
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    rounds = name.startswith(("deepseek_v2", "deepseek_v3", "glm4", "llama4"))  # routers or rotation, to float32
    torch.testing.assert_close(logits(pruned), logits(masked), atol=1e-6 if rounds else 1e-10, rtol=0)
    ids = token_ids(1, 8)
    with torch.no_grad():  # caches follow the layers that are left
        torch.testing.assert_close(pruned(ids, use_cache=True).logits, logits(pruned, ids), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_stock_transformers_loads_what_one_number_describes(name, tmp_path):
    model = tiny(name, dtype=torch.float32)
    hfprune.apply_plan(model, plan_of(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    ids = token_ids(1, 5)
    found = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, loaded)]
    assert torch.equal(*found)
    written = json.loads((tmp_path / "config.json").read_text())
    assert 4 in (written.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    assert hfprune.load(tmp_path).config.model_type == model.config.model_type


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_stock_transformers_loads_experts_heads_and_layers(name, tmp_path):
    units = ("experts", "heads", "layers") if name in HEADED_MIXTURES else ("experts", "layers")
    assert {1, 2} <= set(head_counts(tiny(name)) if "heads" in units else (1, 2))
    for heads, layers in (((1,), (0, 2)), ((0, 1), (1, 2))):
        model = tiny(name, dtype=torch.float32)
        plan = plan_of(model, KEEP, units, heads=heads, layers=layers)
        check_stock(model, plan.groups, plan.keep)
        hfprune.apply_plan(model, plan)
        assert len(mixed_layers(model)) == len(set(mixed_layers(tiny(name))) & set(layers))
        model.save_pretrained(tmp_path / str(len(heads)))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(len(heads)), experts_implementation="eager")
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_routers_train_with_their_own_loss_afterwards(name, tmp_path):
    model, ids = tiny(name, dtype=torch.float32), token_ids()
    hfprune.apply_plan(model, plan_of(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    if find_spec(model).experts.loss_attribute is None:
        assert not hasattr(model, "num_experts")  # nothing else reads the number
        return
    found = [m(input_ids=ids, labels=ids, output_router_logits=True) for m in (model, loaded)]
    assert torch.equal(found[0].aux_loss, found[1].aux_loss)
    assert torch.equal(found[0].loss, found[1].loss)
    model = tiny(name)
    model.config.output_router_logits = True
    before = parameter_count(model)
    with pytest.raises(PlanError, match=r"output_router_logits.*keeps 2 to 5.*Uniform"):
        hfprune.apply_plan(model, plan_of(model, UNEVEN))
    assert parameter_count(model) == before


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_training_goes_on_with_what_survives(name):
    model = tiny(name)
    trained = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained.step()
    keep = uneven(name)
    plan = plan_of(model, keep)
    cuts, order = plan_cuts(model, plan), list(model.named_parameters())
    moments, state = {n: trained.state[p]["exp_avg"] for n, p in order}, trained.state_dict()
    assert cut_optimizer_state(state, [(n, p.shape) for n, p in order], cuts) == 0
    apply_plan(model, plan)
    again = torch.optim.AdamW(model.parameters(), lr=1e-3)
    again.load_state_dict(state)
    for number in mixed_layers(model):
        block = block_of(model, model.model.layers[number])
        for part in (router_of(block), block.experts):
            for parameter in part.parameters():
                full = next(n for n, p in model.named_parameters() if p is parameter)
                assert torch.equal(again.state[parameter]["exp_avg"], moments[full][list(keep[number])])
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    again.step()


@pytest.mark.parametrize("keys", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}], ids=str)
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_layers_without_a_mixture_stay_as_they_are(name, keys, tmp_path):
    config = mixtures()[name]
    for key, value in keys.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()]
    models.append(copy.deepcopy(models[0]))
    mixed = mixed_layers(models[0])
    assert [g.num_units for g in find_groups(models[0], ("heads",))] == [2, 2, 2]
    assert [g.layer for g in find_groups(models[0], ("experts",))] == mixed
    scored = scored_groups(models[0], find_groups(models[0], ("layers",)), ActivationTaylor())
    assert [g.layer for g in scored if g.kind == "mlp"] == sorted({0, 1, 2} - set(mixed))
    plan = plan_of(models[0], KEEP, ("experts", "layers"), layers=(1, 2))
    mask_plan(models[1], plan)
    hfprune.apply_plan(models[0], plan)
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=1e-5, rtol=0)
    models[0].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(loaded.config) is type(config)
    assert torch.equal(logits(loaded), logits(models[0]))


def test_a_model_without_any_mixture_has_no_experts():
    config = mixtures()["qwen3_moe"]
    config.mlp_only_layers = [0, 1, 2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedArchitectureError, match="Every layer of this Qwen3MoeForCausalLM has an MLP"):
        find_groups(model, ("experts",))


@pytest.mark.parametrize("name", MIXTURE_CLASSES)
def test_other_numbers_per_layer_need_a_layout(name, tmp_path):
    model = tiny(name, dtype=torch.float32)
    plan = plan_of(model, uneven(name))
    kept = [len(uneven(name)[layer]) for layer in mixed_layers(model)]
    if len(set(kept)) == 1:
        pytest.skip("its two mixtures keep equal numbers")
    numbers = rf"different numbers of experts \({min(kept)} to {max(kept)}\)"
    with pytest.raises(UnsupportedArchitectureError, match=numbers):
        check_stock(model, plan.groups, plan.keep)
    hfprune.apply_plan(model, plan)
    with pytest.raises(ConfigError, match="layout='per_layer'"):
        hfprune.io.layouts.LAYOUTS.get("uniform").check(model)
    with pytest.raises(ConfigError, match="cannot replace removed experts"):
        hfprune.io.layouts.LAYOUTS.get("padded").check(model)
    model.save_pretrained(tmp_path)
    loaded = hfprune.load(tmp_path)
    loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))
    routers = [router_of(block_of(loaded, loaded.model.layers[layer])) for layer in mixed_layers(loaded)]
    assert [len(router.weight) for router in routers] == kept


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_a_router_keep_equal_numbers(name):
    model = tiny(name)
    stock = inventory(model, ("experts",))
    assert [(g.num_units, g.least) for g in stock.groups] == [(3, 2)] * 4
    found = allocate(stock, Budget(pruning_ratio=0.1), scores={g.name: torch.arange(3.0) for g in stock.groups})
    assert found.widths == (2, 2, 2, 2)
    assert found.kinds[0].dense, found.kinds[0].kept == ((6, 6), (4, 4))
    assert found.params == stock.dense_params - 4 * stock.costs[0]
    assert allocate(stock, Budget(allocated=True), Explicit(experts=4)).widths == (2, 2, 2, 2)
    assert allocate(stock, Budget(allocated=True), Explicit(experts=[6, 6, 4])).widths == (3, 3, 2, 2)
    with pytest.raises(ConfigError, match="must be a multiple of 2"):
        allocate(stock, Budget(allocated=True), Explicit(experts=5))
    with pytest.raises(ConfigError, match="must keep at least 2; 1 cannot be kept"):
        allocate(stock, Budget(allocated=True), Explicit(experts=2))
    with pytest.raises(ConfigError, match="Sensitivity prunes one group at a time"):
        allocate(stock, Budget(pruning_ratio=0.1), Sensitivity())
    scores = {g.name: torch.arange(3.0) + g.layer + 5 * ("group1" in g.name) for g in stock.groups}
    target = stock.dense_params - 2 * stock.costs[0]
    assert allocate(stock, Budget(target_params=target), GlobalRank(floor=0.0), scores=scores).widths == (2, 2, 3, 3)
    before = parameter_count(model)
    with pytest.raises(PlanError, match=r"2 groups of experts in layer 1 must keep equal numbers.*2 to 3"):
        apply_plan(model, plan_of(model, ((), (0, 1, 3, 4, 5), (0, 1, 3, 4))))
    assert parameter_count(model) == before
    router = router_of(block_of(model, model.model.layers[1]))
    router.num_group = 4
    with pytest.raises(UnsupportedArchitectureError, match="4 groups, which do not divide its 6 experts"):
        find_groups(model, ("experts",))


def test_no_layer_keeps_fewer_experts_than_a_token_goes_through():
    model = tiny("mixtral")
    stock = inventory(model, ("experts",))
    scores = {g.name: torch.arange(6.0) ** g.layer for g in stock.groups}
    least = stock.params([2, 2, 2])
    for allocation in (Uniform(), GlobalRank(floor=0.0)):
        found = allocate(stock, Budget(target_params=least), allocation, scores=scores)
        assert found.widths == (2, 2, 2)
        assert found.params == least == stock.dense_params - 12 * stock.costs[0]
        with pytest.raises(ConfigError, match=f"smallest possible `target_params` is {least}"):
            allocate(stock, Budget(target_params=least - 1), allocation, scores=scores)
    with pytest.raises(PlanError, match=r"layers.1.mlp.experts must keep at least 2 of its units; the plan keeps 1"):
        plan_of(model, ((0, 1), (3,), (0, 1)))
    with pytest.raises(ConfigError, match="6 units and must keep at least 2; 1 cannot be kept"):
        allocate(stock, Budget(allocated=True), Explicit(experts=1))
    assert allocate(stock, Budget(allocated=True), Explicit(experts=[6, 3, 2])).widths == (6, 3, 2)
    assert allocate(stock, Budget(allocated=True), Uniform(share={"experts": 0.9})).widths == (2, 2, 2)
    assert allocate(stock, Budget(allocated=True), Uniform(share={"experts": 1 / 3})).widths == (4, 4, 4)
    curves = {g.name: {1 / 3: 0.1 + g.layer} for g in stock.groups}
    found = allocate(stock, Budget(target_params=stock.params([2, 6, 6])), Sensitivity(curves=curves))
    assert found.widths == (2, 6, 6)


def test_what_does_not_go_with_mixtures_is_refused():
    model = tiny("mixtral")
    with pytest.raises(UnsupportedArchitectureError, match="has no mixture-of-experts layers: leave 'experts' out"):
        find_groups(tiny("llama"), ("experts",))
    with pytest.raises(UnsupportedArchitectureError, match="stacked tensors"):
        find_groups(model, ("channels",))
    with pytest.raises(ConfigError, match=r"stacked tensors, which sparse methods do not support"):
        check_sparse(model, sparse_method("wanda"), Sparsity.parse("0.5"))
    pruned = tiny("mixtral")
    apply_plan(pruned, plan_of(pruned))
    with pytest.raises(PlanError, match=r"6 units in model.layers.0.mlp.experts, the model has 4"):
        apply_plan(pruned, plan_of(model))


@pytest.mark.parametrize("units", [("experts",), ("heads",), ("layers",)])
def test_sharded_strategies_are_refused_whatever_the_units(units, tmp_path):
    target = find_target(PruningModule(save_tiny(tmp_path, "mixtral")), objective=None, model=None, neurons=())
    target.units = units
    with pytest.raises(
        ConfigError,
        match=r"Mixture-of-experts models are not supported under ModelParallelStrategy.*single device or DDP",
    ):
        check_strategy(SimpleNamespace(strategy=ModelParallelStrategy()), target, Magnitude())


def test_figures_need_no_mlp_width():
    found = measure(tiny("qwen2_moe"), None, reference=None, latency=False).to_dict()
    assert found["width"] is None
    assert found["widths"] == []
    assert found["size"]["macs"] > 0


def test_a_run_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "dense", "mixtral")
    common = [f"--model.path={folder}", *TINY_FLAGS, "--importance.units=[experts]"]
    assert main(["prune", *common, "--pruning_ratio=0.2", "--output_dir=out"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = {len(units) for units in PruningPlan.load(tmp_path / "out" / "model" / "plan.json").keep.values()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert kept == {model.config.num_local_experts} != {6}
    assert report["saved"]["parameters"] == parameter_count(model) == report["plan"]["budget"]["params"]
    assert report["saved"]["max_logit_difference_after_reload"] < 1e-5
    for flags, text in (
        (["--importance.criterion=VectorTaylor"], "VectorTaylor does not score experts"),
        (["--importance.compensation=LeastSquares"], "experts are not read by a single projection"),
        (["--importance.units=[layers]", "--importance.criterion=VectorTaylor"], "VectorTaylor does not score experts"),
        (["--importance.criterion=Magnitude", "--pruning_ratio=0.9"], "largest possible --pruning_ratio"),
    ):
        assert main(["prune", *common, "--pruning_ratio=0.2", "--output_dir=other", *flags]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "other").exists()
