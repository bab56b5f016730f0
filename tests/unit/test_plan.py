"""Plans: what they refuse, and that they survive the disk."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfprune import TaylorImportanceCallback
from hfprune.allocation import Explicit, Uniform
from hfprune.models import find_groups
from hfprune.models.surgery import apply_plan
from hfprune.plan import UNIT_KINDS, Group, PruningPlan, Slice, UnitKind, unit_kinds
from hfprune.sweep.grid import Method
from hfprune.utils.errors import ConfigError, PlanError
from tests.helpers.models import tiny


def plan_of(model, keep, **kwargs):
    groups = find_groups(model)
    defaults = {"model_class": type(model).__name__, "groups": groups, "config": {"intermediate_size": len(keep)}}
    return PruningPlan(keep={g.name: tuple(keep) for g in groups}, **defaults | kwargs)


@given(
    keep=st.sets(st.integers(0, 23), min_size=1),
    offset=st.integers(0, 9),
    width=st.integers(1, 4),
    note=st.text(max_size=20),
)
def test_json_round_trip(keep, offset, width, note):
    group = Group(
        name="g", kind="mlp", num_units=24, slices=(Slice(module="m", side="in", offset=offset, width=width),)
    )
    plan = PruningPlan(
        model_class="X", groups=(group,), keep={"g": tuple(sorted(keep))}, config={"n": 1}, provenance={"note": note}
    )
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("keep", "found"), [((), "none"), ((1, 5, 1), "1 twice"), ((-1, 2), "-1 to 2"), ((0, 24), "0 to 24")]
)
def test_kept_units_are_checked(keep, found):
    with pytest.raises(PlanError, match=f"unique, at least one, and from 0 to 23; got {found}"):
        plan_of(tiny(), keep)


KINDS = {
    "list": list,
    "range": lambda units: range(min(units), max(units) + 1),
    "set": set,
    "unsorted": lambda units: list(reversed(units)),
    "numpy": np.array,
    "int32": lambda units: np.array(units, dtype=np.int32),
    "numpy_scalars": lambda units: [np.int64(unit) for unit in units],
    "tensor": torch.tensor,
    "tensors": lambda units: [torch.tensor(unit) for unit in units],
    "iterator": iter,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_units_of_any_integers_become_a_sorted_tuple(kind):
    """The plan can be saved, and is equal to the one from a tuple."""
    group = Group(name="g", kind="mlp", num_units=24, slices=())
    made = PruningPlan(model_class="X", groups=[group], keep={"g": KINDS[kind]([2, 3, 4])}, config={"n": np.int64(3)})
    assert made == PruningPlan(model_class="X", groups=(group,), keep={"g": (2, 3, 4)}, config={"n": 3})
    assert {type(unit) for unit in made.keep["g"]} == {int}
    assert PruningPlan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (np.ones(24, dtype=bool), "boolean mask"),
        (torch.ones(24, dtype=torch.bool), "boolean mask"),
        ([True, False], "boolean mask"),
        ([np.True_], "boolean mask"),
        (np.array([0.0, 1.0]), "one-dimensional list of integers"),
        (torch.zeros(2, 2, dtype=torch.int64), "one-dimensional list of integers"),
        (torch.tensor(3), "one-dimensional list of integers"),
        ("012", "one-dimensional list of integers"),
        (None, "one-dimensional list of integers"),
    ],
)
def test_kept_units_that_are_none(keep, match):
    group = Group(name="g", kind="mlp", num_units=24, slices=())
    with pytest.raises(PlanError, match=match):
        PruningPlan(model_class="X", groups=(group,), keep={"g": keep}, config={})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "Not a pruning plan"),
        ("[]", "Not a pruning plan"),
        ("{}", "Not a pruning plan: KeyError"),
        (json.dumps({"format": "other", "version": 1}), "format 'other'"),
        (json.dumps({"format": "hfprune-plan", "version": 99}), "version 99"),
    ],
)
def test_files_that_are_no_plans(tmp_path, text, match):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=match):
        PruningPlan.load(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(PlanError, match="Cannot read a plan"):
        PruningPlan.load(tmp_path / "nothing.json")


def test_plan_of_another_class_or_width_is_refused_and_nothing_changes():
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(PlanError, match="made for MistralForCausalLM, the model is LlamaForCausalLM"):
        apply_plan(model, plan_of(tiny("mistral"), range(8)))
    plan = plan_of(tiny(), range(8))
    apply_plan(other := tiny(), plan)
    with pytest.raises(
        PlanError, match=r"expects 24 units in model.layers.0.mlp, the model has 8. It looks pruned already"
    ):
        apply_plan(other, plan)
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


def test_surgery_keeps_dtype_and_trainability():
    model = tiny(dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    apply_plan(model, plan_of(model, range(5)))
    up, gate = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    assert (up.weight.dtype, up.out_features, up.weight.requires_grad) == (torch.bfloat16, 5, False)
    assert gate.weight.requires_grad
    assert model.model.layers[0].mlp.intermediate_size == 5
    assert up.weight.is_contiguous()


@pytest.mark.parametrize(
    "old",
    [
        lambda: unit_kinds(["mlp", "blocks"]) == ("mlp", "layers"),
        lambda: find_groups(tiny("llama"), ("blocks",))[0].kind == "layers",
        lambda: Explicit(blocks=[1]).layers == [1],
        lambda: Uniform(share={"blocks": 0.5}).share == {"layers": 0.5},
        lambda: TaylorImportanceCallback(units=["blocks"], pruning_ratio=0.2).options.units == ("layers",),
        lambda: Method(name="a", units=("blocks",)).units == ("layers",),
    ],
)
def test_blocks_is_the_deprecated_name_of_layers(old):
    with pytest.warns(FutureWarning, match="'blocks' is now 'layers'"):
        assert old()


def test_takes_blocks_is_the_deprecated_name_of_takes_layers():
    with pytest.warns(FutureWarning, match="takes_layers"):
        made = type("Old", (Uniform,), {"takes_blocks": False})
    assert not made.takes_layers
    assert Uniform.takes_layers


def test_explicit_takes_one_of_both_names():
    with pytest.raises(ConfigError, match="give `layers` only"):
        Explicit(blocks=2, layers=2)


def test_plans_of_earlier_versions_are_read_without_a_warning():
    groups = find_groups(tiny("llama"), ("layers",))
    plan = PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep={groups[0].name: (0, 2)}, config={})
    old = plan.to_json().replace('"kind":"layers"', '"kind":"block"')
    assert old != plan.to_json()
    assert PruningPlan.from_json(old) == plan
    assert PruningPlan.from_json(old).removed_layers() == (1,)


def test_the_table_of_unit_kinds_is_what_annotations_and_finders_know():
    names = {*UNIT_KINDS, *(kind.old_name for kind in UNIT_KINDS.values() if kind.old_name)}
    assert names == set(get_args(UnitKind))
    for name, kind in UNIT_KINDS.items():
        model = tiny("mixtral" if name == "experts" else "llama")
        groups = find_groups(model, (name,))
        assert (len(groups) == model.config.num_hidden_layers) == kind.per_layer
        assert {group.kind for group in groups} == {name}
