"""The proof of an architecture: right tables pass, and each kind of wrong table is refused."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig

from hfprune.models import ARCHITECTURES, find_groups
from hfprune.models.architectures import GPT_NEOX, LLAMA
from hfprune.models.forward import final_hidden
from hfprune.models.groups import pin_spec
from hfprune.models.proof import CLAIMS, KIND_CLAIMS, prove
from hfprune.models.twins import twin
from hfprune.utils.compat import causal_lm_classes
from hfprune.utils.errors import UnsupportedArchitectureError
from tests.helpers import traps
from tests.helpers.models import MIXTURES, NAMES, configs, mixtures, table

CONFIGS = configs() | mixtures()


@functools.cache
def llama(model_class=None):
    return twin(LlamaConfig(num_key_value_heads=8, num_hidden_layers=2), model_class=model_class)


def claims(spec, model):
    """Returns the claims that do not hold, with their reasons; mixtures of experts are not looked at."""
    found = prove(replace(spec, model_class=type(model).__name__), model).claims
    return {name: claim.reason for name, claim in found.items() if not claim.proven and name != "experts"}


ONE_EACH = list({table(name).model_class: name for name in NAMES + MIXTURES}.values())
"""One config for each table."""


@pytest.mark.parametrize("name", ONE_EACH)
def test_hand_written_tables_pass(name):
    spec = table(name)
    proof = prove(spec, twin(CONFIGS[name]))
    described = {"mlp"} if spec.mlp else {"experts"}
    described |= {"layers"} | ({"heads"} if spec.attention else set()) | ({"channels"} if spec.stream else set())
    assert set(proof.kinds()) == described
    for claim in ("head", "keep_all", "packing", "padding"):
        assert proof.claims[claim].proven, proof.claims[claim].reason
    assert {kind for kind, reason in proof.stated.items() if reason} <= {"heads"}  # GPT-2, GPT-NeoX and OPT
    assert tuple(proof.claims) == CLAIMS


def test_every_table_is_among_the_proven_ones():
    assert {table(name).model_class for name in ONE_EACH} == set(ARCHITECTURES)


def test_the_proof_leaves_the_model_alone():
    model = twin(LlamaConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    prove(LLAMA, model)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == before[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [traps.ScaledHeadForCausalLM, traps.CappedHeadForCausalLM])
def test_a_scaled_or_capped_head_is_refused(kind):
    model = llama(kind)
    proof = prove(replace(LLAMA, model_class=kind.__name__), model)
    assert not proof.claims["head"].proven
    assert "head: " in proof.reason()
    assert "does not describe its output head" in proof.reason()
    assert (proof.usable, proof.verdict) == (False, "refused")


FUSED = replace(LLAMA, mlp=traps.FUSED, width_attributes=())
MLP_TRAPS = [
    (traps.Interleaved, FUSED),
    (traps.Swapped, FUSED),
    (traps.SecondReader, LLAMA),
    (traps.SilentReader, LLAMA),
    (traps.NormBetween, LLAMA),
    (traps.TopNeurons, LLAMA),
]


@pytest.mark.parametrize(("kind", "spec"), MLP_TRAPS, ids=lambda v: getattr(v, "__name__", ""))
def test_neurons_that_a_table_gets_wrong_are_refused_and_the_rest_is_kept(kind, spec):
    spec = replace(spec, width_attributes=())
    found = claims(spec, llama(traps.with_mlp(kind)))
    assert "neurons" in found
    assert not {"head", "heads", "layers", "keep_all"} & set(found)


@pytest.mark.parametrize("kind", [traps.MLP, traps.FusedMLP])
def test_the_same_classes_without_the_trap_pass(kind):
    spec = replace(FUSED if kind is traps.FusedMLP else LLAMA, width_attributes=())
    assert claims(spec, llama(traps.with_mlp(kind))) == {}


def test_a_restricted_spec_says_why_its_units_cannot_be_removed():
    model = llama(traps.with_mlp(traps.NormBetween))
    proof = prove(replace(LLAMA, width_attributes=(), model_class=type(model).__name__), model)
    with pytest.raises(
        UnsupportedArchitectureError, match="MLP neurons of NormBetweenForCausalLM cannot be removed: the"
    ):
        find_groups(model, ("mlp",), spec=proof.spec)
    assert find_groups(model, ("heads", "layers"), spec=proof.spec)
    assert proof.verdict == "in part"


def test_interleaved_queries_keys_and_values_are_refused():
    model = twin(GPTNeoXConfig())
    spec = replace(GPT_NEOX, attention=replace(GPT_NEOX.attention, heads=traps.CONSECUTIVE))
    assert "the model without heads differs" in claims(spec, model)["heads"]
    assert "heads" not in claims(GPT_NEOX, model)


def test_heads_that_share_a_norm_are_refused():
    found = claims(LLAMA, llama(traps.SharedHeadsForCausalLM))
    assert "heads" in found
    assert "neurons" not in found


def test_query_heads_in_another_order_are_refused():
    """A table with one query head per key-value head, of a class with grouped attention."""
    spec = replace(LLAMA, attention=replace(LLAMA.attention, ratio_attribute=None))
    assert "heads" in claims(spec, llama())


def test_a_gate_that_a_table_leaves_out_is_refused():
    assert "neurons" in claims(replace(LLAMA, mlp=LLAMA.mlp[1:]), llama())


def test_a_norm_that_a_table_leaves_out_is_refused():
    stream = replace(LLAMA.stream, norms=LLAMA.stream.norms[:1])
    assert set(claims(replace(LLAMA, stream=stream), llama())) == {"channels"}


def test_a_norm_with_an_offset_is_refused_without_it():
    stream = replace(LLAMA.stream, norm_offset=1.0)
    assert set(claims(replace(LLAMA, stream=stream), llama())) == {"channels"}


def test_layers_that_depend_on_their_number_or_place_are_not_written_as_stock_models():
    for kind in (traps.CountedLayersForCausalLM, traps.PlacedLayersForCausalLM):
        found = claims(LLAMA, llama(kind))
        assert "layers: the model that its config builds gives other logits" in found["config_reload"]


def test_a_key_that_does_not_state_the_width_is_found():
    proof = prove(replace(LLAMA, width_key="max_position_embeddings"), llama())
    assert proof.claims["neurons"].proven
    assert "its config builds" in proof.stated["mlp"]
    assert not proof.claims["config_reload"].proven


def test_packing_is_corrected_by_the_proof():
    proof = prove(replace(table("opt"), packing="positions"), twin(CONFIGS["opt"]))
    assert (proof.spec.packing, proof.claims["packing"].proven) == ("mask", True)


def test_every_unit_kind_has_a_claim():
    from hfprune.plan import UNIT_KINDS

    assert set(KIND_CLAIMS) <= set(UNIT_KINDS)
    assert set(KIND_CLAIMS.values()) < set(CLAIMS)
    assert AutoConfig.for_model("llama").model_type in causal_lm_classes()


def test_padding_that_changes_other_tokens_is_refused_where_it_is_used():
    """Its positions count padding on the left."""
    model = llama(traps.CountedPaddingForCausalLM)
    proof = prove(replace(LLAMA, model_class=type(model).__name__), model)
    assert (proof.spec.padding, proof.claims["padding"].proven) == ("right", False)
    pinned = copy.deepcopy(model)
    pin_spec(pinned, proof.spec)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    final_hidden(pinned, {"input_ids": ids, "attention_mask": (ids > 0).long()})
    with pytest.raises(UnsupportedArchitectureError, match=r"Padding on the left changes .*: pad on the right\."):
        final_hidden(pinned, {"input_ids": ids.flip(1), "attention_mask": (ids > 0).long().flip(1)})
