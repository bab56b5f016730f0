"""Adapters: where they go, that they start as the identity, that merging changes nothing."""

import pytest
import torch
from torch import nn

from hfprune import apply_plan, make_plan
from hfprune.models import find_groups, find_spec
from hfprune.recovery import LoraRecovery, add_lora, merge_lora
from hfprune.utils.errors import ConfigError
from tests.helpers.models import NAMES, tiny, token_ids


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_identity_at_first_and_merged_equals_unmerged(name, options):
    model = tiny(name)
    dense = logits(model)
    count = sum(1 for _ in model.parameters())
    adapted = add_lora(model, LoraRecovery(rank=2, **options))
    torch.testing.assert_close(logits(adapted), dense, atol=1e-12, rtol=0)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:
            p.add_(0.1 * torch.randn_like(p))
    moved = logits(adapted)
    assert (moved - dense).abs().max() > 1e-3
    merged = merge_lora(adapted)
    torch.testing.assert_close(logits(merged), moved, atol=1e-10, rtol=0)
    assert sum(1 for _ in merged.parameters()) == count
    find_groups(merged)  # plain projections again


@pytest.mark.parametrize("name", NAMES)
def test_default_targets_are_every_projection_of_a_layer(name):
    model = tiny(name)
    layers = model.get_submodule(find_spec(model).layers)
    projections = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in layers.modules())
    adapted = add_lora(model, LoraRecovery(rank=2))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in adapted.named_parameters()) == projections


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_values_are_checked(bad):
    (argument,) = bad
    with pytest.raises(ConfigError, match=f"^LoraRecovery: {argument}="):
        LoraRecovery(**bad)


@pytest.mark.parametrize(
    ("name", "lost"), [("opt", {"mlp_sublayers": (1,)}), ("llama", {"attention_sublayers": (0, 1, 2)})]
)
def test_adapters_of_a_model_without_some_sublayers(name, lost):
    model = tiny(name, dtype=torch.float32)
    ids = token_ids()
    groups = find_groups(model, tuple(lost))
    keep = {group.name: () if group.layer in lost[group.kind] else (0,) for group in groups}
    apply_plan(model, make_plan(model, keep=keep, units=tuple(lost)))
    before = model(input_ids=ids).logits
    wrapped = add_lora(model, LoraRecovery(rank=2))
    adapted = {key.split(".lora_A")[0].rpartition(".")[2] for key, _ in wrapped.named_parameters() if "lora_A" in key}
    assert ("fc1" in adapted) if name == "opt" else (adapted == {"gate_proj", "up_proj", "down_proj"})
    torch.testing.assert_close(wrapped(input_ids=ids).logits, before)
    wrapped(input_ids=ids, labels=ids).loss.backward()
