import pytest
import torch

from hfprune.evaluation.size_and_speed import disk_bytes, measure_size
from hfprune.models import find_groups
from hfprune.models.surgery import apply_plan
from hfprune.plan import PruningPlan
from tests.helpers.models import NAMES, save_tiny, tiny

TOKENS, HIDDEN, HEADS, KV_HEADS, WIDTH, VOCAB, LAYERS = 10, 16, 4, 2, 24, 61, 3


def test_llama_by_hand():
    found = measure_size(tiny(dtype=torch.float32), tokens=TOKENS)
    head = HIDDEN // HEADS
    projections = HIDDEN * HIDDEN * 2 + HIDDEN * KV_HEADS * head * 2 + 3 * HIDDEN * WIDTH
    attention = 2 * HEADS * head * TOKENS * TOKENS
    assert found.macs == LAYERS * (TOKENS * projections + attention) + TOKENS * HIDDEN * VOCAB
    assert found.kv_cache_bytes == 2 * LAYERS * KV_HEADS * head * TOKENS * 4
    assert found.tokens == TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_every_class(name):
    model = tiny(name, dtype=torch.bfloat16)
    found = measure_size(model, tokens=1000)  # shortened to the model's positions
    assert found.tokens == 64
    assert found.weight_bytes == 2 * sum({id(p): p.numel() for p in model.parameters()}.values())
    assert found.macs > 0
    assert found.kv_cache_bytes > 0


def test_pruning_takes_macs_and_leaves_the_cache():
    model = tiny(dtype=torch.float32)
    before = measure_size(model, tokens=TOKENS)
    groups = find_groups(model)
    keep = {group.name: tuple(range(8)) for group in groups}
    apply_plan(
        model,
        PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={"intermediate_size": 8}),
    )
    after = measure_size(model, tokens=TOKENS)
    assert before.macs - after.macs == LAYERS * TOKENS * 3 * HIDDEN * (WIDTH - 8)
    assert after.kv_cache_bytes == before.kv_cache_bytes


def test_bytes_on_disk(tmp_path):
    folder = save_tiny(tmp_path / "model")
    assert disk_bytes(folder) == (tmp_path / "model/model.safetensors").stat().st_size
    assert disk_bytes(None) is None
    assert disk_bytes("owner/name") is None
