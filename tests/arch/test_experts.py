"""Experts of mixtures as units: masks, costs, configs, layouts, scores, a fit, and what is refused."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfprune
from hfprune.allocation import Explicit, GlobalRank, Sensitivity, Uniform, allocate
from hfprune.arch import check_stock, config_values, find_groups, parameter_count, unit_cost
from hfprune.calibration import weight_scores
from hfprune.cli import main
from hfprune.criteria import (
    ActivationNorm,
    ActivationTaylor,
    CoupledTaylor,
    Fisher,
    Magnitude,
    VectorTaylor,
    WandaStructured,
    scored_groups,
)
from hfprune.errors import ConfigError, PlanError, UnsupportedArchitectureError
from hfprune.evaluation.stage import measure
from hfprune.layerwise.sparse import check_sparse
from hfprune.plan import PruningPlan
from hfprune.recording import UnitMask
from hfprune.sparse import Sparsity, sparse_method
from hfprune.surgery import apply_plan, mask_plan
from hfprune.types import Budget
from tests.criteria.toys import calibrate, check
from tests.models import MIXTURES, inventory, save_tiny, tiny, token_ids
from tests.reference import taylor as slow
from tests.reference.experts import by_hand, contributions

KEEP = ((0, 2, 3, 5), (1, 2, 4, 5), (0, 1, 3, 4))
UNEVEN = ((0, 2, 3, 5), (1, 2), (0, 1, 2, 3, 4))
LENGTHS = (6, 4)


def sequences():
    return [token_ids(1, n, seed=n)[0] for n in LENGTHS]


def plan_of(model, keep=KEEP, units=("experts",), **others):
    groups = find_groups(model, units)
    kept = {g.name: keep[g.layer] if g.kind == "experts" else others[g.kind] for g in groups}
    config = config_values(model, groups, kept)
    return PruningPlan(model_class=type(model).__name__, groups=groups, keep=kept, config=config)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


@pytest.mark.parametrize("keep", [KEEP, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", MIXTURES)
def test_pruned_is_the_dense_model_whose_routers_cannot_choose_what_went(name, keep):
    model, pruned, masked = tiny(name), tiny(name), tiny(name)
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
    gone = sum(len(r) for r in removed)
    assert parameter_count(model) - parameter_count(pruned) == gone * unit_cost(model, plan.groups[0])


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_heads_and_layers_together(name):
    pruned, masked = tiny(name), tiny(name)
    plan = plan_of(pruned, UNEVEN, ("experts", "heads", "blocks"), heads=(1,), block=(0, 2))
    apply_plan(pruned, plan)
    mask_plan(masked, plan)
    torch.testing.assert_close(logits(pruned), logits(masked), atol=1e-10, rtol=0)
    ids = token_ids(1, 8)
    with torch.no_grad():  # caches follow the layers that are left
        torch.testing.assert_close(pruned(ids, use_cache=True).logits, logits(pruned, ids), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_stock_transformers_loads_what_one_number_describes(name, tmp_path):
    model = tiny(name, dtype=torch.float32)
    hfprune.apply_plan(model, plan_of(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.get("num_local_experts", written.get("num_experts")) == 4
    assert hfprune.load(tmp_path).config.model_type == model.config.model_type


@pytest.mark.parametrize("name", MIXTURES)
def test_other_numbers_per_layer_need_a_layout(name, tmp_path):
    model = tiny(name, dtype=torch.float32)
    plan = plan_of(model, UNEVEN)
    with pytest.raises(UnsupportedArchitectureError, match=r"different numbers of experts \(2 to 5\)"):
        check_stock(model, plan.groups, plan.keep)
    hfprune.apply_plan(model, plan)
    with pytest.raises(ConfigError, match="--layout per_layer"):
        hfprune.layouts.LAYOUTS.get("uniform").check(model)
    with pytest.raises(ConfigError, match="none can stand for a removed experts"):
        hfprune.layouts.LAYOUTS.get("padded").check(model)
    model.save_pretrained(tmp_path)
    loaded = hfprune.load(tmp_path)
    loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))
    assert [g.num_units for g in find_groups(loaded, ("experts",))] == [4, 2, 5]


def test_no_layer_keeps_fewer_experts_than_a_token_goes_through():
    model = tiny("mixtral")
    stock = inventory(model, ("experts",))
    scores = {g.name: torch.arange(6.0) ** g.layer for g in stock.groups}
    least = stock.params([2, 2, 2])
    for allocation in (Uniform(), GlobalRank(floor=0.0)):
        found = allocate(stock, Budget(target_params=least), allocation, scores=scores)
        assert found.widths == (2, 2, 2)
        assert found.params == least == stock.dense_params - 12 * stock.costs[0]
        with pytest.raises(ConfigError, match=f"smallest possible --target_params is {least}"):
            allocate(stock, Budget(target_params=least - 1), allocation, scores=scores)
    with pytest.raises(ConfigError, match="6 units, of which at least 2 must stay; 1 cannot be kept"):
        allocate(stock, Budget(allocated=True), Explicit(experts=1))
    assert allocate(stock, Budget(allocated=True), Explicit(experts=[6, 3, 2])).widths == (6, 3, 2)
    assert allocate(stock, Budget(allocated=True), Uniform(share={"experts": 0.9})).widths == (2, 2, 2)
    assert allocate(stock, Budget(allocated=True), Uniform(share={"experts": 1 / 3})).widths == (4, 4, 4)
    curves = {g.name: {1 / 3: 0.1 + g.layer} for g in stock.groups}
    found = allocate(stock, Budget(target_params=stock.params([2, 6, 6])), Sensitivity(curves=curves))
    assert found.widths == (2, 6, 6)


@pytest.mark.parametrize("name", MIXTURES)
def test_taylor_scores_are_what_contributions_are_worth(name):
    model = tiny(name)
    groups = find_groups(model, ("experts",))
    worth = contributions(tiny(name), sequences(), slow.objective_of("entropy"))
    tokens = sum(LENGTHS)
    forms = {
        "per_token": lambda rows: sum(row.abs().sum(0) for row in rows),
        "per_sequence": lambda rows: sum(row.sum(0).abs() for row in rows),
        "signed": lambda rows: sum(row.sum(0) for row in rows).abs(),
    }
    batches = [{"input_ids": ids[None]} for ids in sequences()]
    for reduction, form in forms.items():
        expected = {g.name: (form([w[g.layer] for w in worth]) / tokens).tolist() for g in groups}
        found = calibrate(model, ActivationTaylor(reduction=reduction), "entropy", groups=groups, batches=batches)
        check(found, expected, rtol=1e-5)  # routers and norms round to float32
    worth = contributions(tiny(name), sequences(), slow.objective_of("cross_entropy"))
    squares = {g.name: sum(w[g.layer].square().sum(0) for w in worth) for g in groups}
    expected = {name: (value / sum(n - 1 for n in LENGTHS)).tolist() for name, value in squares.items()}
    check(calibrate(model, Fisher(), "cross_entropy", groups=groups, batches=batches), expected, rtol=1e-5)


def test_scores_do_not_depend_on_padding_or_batch():
    model = tiny("mixtral")
    groups = find_groups(model, ("experts",))
    alone = [{"input_ids": ids[None]} for ids in sequences()]
    padded = torch.zeros(2, 6, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(sequences()):
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    one = calibrate(model, ActivationNorm(), groups=groups, batches=alone)
    both = calibrate(model, ActivationNorm(), groups=groups, batches=[{"input_ids": padded, "attention_mask": mask}])
    for name in one:
        torch.testing.assert_close(one[name], both[name], rtol=1e-6, atol=0)


def test_norms_are_those_of_the_router_s_weights_and_magnitudes_those_of_all_weights():
    model = tiny("mixtral")
    groups = find_groups(model, ("experts",))
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = {g.name: [0.0] * 6 for g in groups}
    for ids in sequences():
        seen.clear()
        logits(model, ids[None])
        for g, (_, weights, chosen) in zip(groups, seen, strict=True):
            for row_w, row_c in zip(weights.tolist(), chosen.tolist(), strict=True):
                for w, e in zip(row_w, row_c, strict=True):
                    expected[g.name][e] += w * w / sum(LENGTHS)
    batches = [{"input_ids": ids[None]} for ids in sequences()]
    found = calibrate(tiny("mixtral"), ActivationNorm(), groups=groups, batches=batches)
    check(found, {name: [v**0.5 for v in values] for name, values in expected.items()}, rtol=1e-6)
    criterion = Magnitude()
    sizes = weight_scores(model, scored_groups(model, groups, criterion), criterion)
    for g, layer in zip(groups, model.model.layers, strict=True):
        for e in range(6):
            parts = (layer.mlp.gate.weight[e], layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.down_proj[e])
            total = sum(v * v for part in parts for v in part.flatten().tolist())
            assert float(sizes[g.name][e]) == pytest.approx(total**0.5, rel=1e-9)


def test_layers_are_scored_by_their_experts_and_heads():
    model = tiny("mixtral")
    groups = find_groups(model, ("blocks",))
    assert {g.kind for g in scored_groups(model, groups, ActivationTaylor())} == {"experts", "heads"}


@pytest.mark.parametrize("criterion", [VectorTaylor(), CoupledTaylor(), WandaStructured()])
def test_other_criteria_say_that_they_cannot(criterion):
    model = tiny("mixtral")
    for units in (("experts",), ("blocks",)):
        with pytest.raises(ConfigError, match=f"{type(criterion).__name__} does not score experts"):
            scored_groups(model, find_groups(model, units), criterion)


def test_what_does_not_go_with_mixtures_is_refused():
    model = tiny("mixtral")
    with pytest.raises(
        UnsupportedArchitectureError, match=r"MixtralForCausalLM are mixtures of experts.*'\[experts\]'"
    ):
        find_groups(model)
    with pytest.raises(UnsupportedArchitectureError, match="no mixtures of experts: leave 'experts' out"):
        find_groups(tiny("llama"), ("experts",))
    with pytest.raises(UnsupportedArchitectureError, match="stacks"):
        find_groups(model, ("channels",))
    with pytest.raises(ConfigError, match=r"stacks, which sparse methods do not read"):
        check_sparse(model, sparse_method("wanda"), Sparsity.parse("0.5"))
    pruned = tiny("mixtral")
    apply_plan(pruned, plan_of(pruned))
    with pytest.raises(PlanError, match=r"6 units in model.layers.0.mlp.experts, the model has 4"):
        apply_plan(pruned, plan_of(model))


def test_figures_need_no_mlp_width():
    found = measure(tiny("qwen2_moe"), None, reference=None, latency=False).to_dict()
    assert found["width"] is None
    assert found["widths"] == []
    assert found["size"]["macs"] > 0


SMALL = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=2", "--data.eval_window=16"]
QUIET = ["--latency=false", "--trainer.enable_progress_bar=false"]


def test_a_run_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "dense", "mixtral")
    common = [f"--model.path={folder}", *SMALL, *QUIET, "--importance.units=[experts]"]
    assert main(["prune", *common, "--pruning_ratio=0.2", "--output_dir=out"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = {len(units) for units in PruningPlan.load(tmp_path / "out" / "model" / "plan.json").keep.values()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert kept == {model.config.num_local_experts} != {6}
    assert report["saved"]["parameters"] == parameter_count(model) == report["plan"]["budget"]["params"]
    assert report["saved"]["max_logit_difference_after_reload"] < 1e-5
    for flags, text in (
        (["--importance.criterion=VectorTaylor"], "VectorTaylor does not score experts"),
        (["--importance.compensation=LeastSquares"], "no one projection reads experts"),
        (["--importance.criterion=Magnitude", "--pruning_ratio=0.9"], "largest possible --pruning_ratio"),
    ):
        assert main(["prune", *common, "--pruning_ratio=0.2", "--output_dir=other", *flags]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "other").exists()
