"""The text model of a multimodal class is pruned in place and saved in its wrapper."""

import torch
from transformers import AutoModelForImageTextToText, Gemma3Config

import hfprune
from hfprune.models import find_groups, find_spec
from hfprune.models.twins import twin
from tests.helpers.models import token_ids


def test_the_text_model_of_gemma_3_is_pruned_in_its_wrapper(tmp_path):
    model = twin(Gemma3Config(), dtype=torch.float32)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert type(model).__name__ == find_spec(model).model_class == "Gemma3ForConditionalGeneration"
    groups = find_groups(model, ("mlp", "heads"))
    keep = {group.name: range(group.num_units - (5 if group.kind == "mlp" else 1)) for group in groups}
    plan = hfprune.make_plan(model, keep=keep)
    hfprune.apply_plan(model, plan)
    assert model.config.text_config.intermediate_size == 32
    model.save_pretrained(tmp_path / "model")

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    ids = token_ids(vocab=89)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for name, tensor in loaded.state_dict().items():
        if "vision_tower" in name or "multi_modal_projector" in name:
            assert torch.equal(tensor, dense[name])
