"""Adapters on disk name the pruned model that they belong to, and are never without it."""

import copy
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModelForCausalLM

import hfprune
from hfprune.models import config_values, find_groups
from hfprune.plan import PruningPlan
from hfprune.recovery.adapters import BASE_FOLDER
from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, token_ids
from tests.helpers.plans import mlp_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def adapted(folder, name="llama", *, uneven=False, **lora):
    """Returns a pruned model with adapters that are not zero, loaded from a dense folder."""
    model = hfprune.load(save_tiny(folder, name))
    groups = find_groups(model)
    keep = {g.name: range(13) for g in groups}
    plan = (
        mlp_plan(model)
        if uneven
        else PruningPlan(
            model_class=type(model).__name__, groups=groups, keep=keep, config=config_values(model, groups, keep)
        )
    )
    hfprune.apply_plan(model, plan)
    wrapped = add_lora(model, LoraRecovery(rank=2, dropout=0.0, **lora))
    wrapped.plan = plan
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    return wrapped.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


CASES = {
    "llama": {},
    "gpt2": {"name": "gpt2"},
    "per_layer": {"uneven": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
}


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_load_from_any_folder(case, tmp_path, monkeypatch):
    """``save_pretrained`` with a relative path; ``AutoPeftModelForCausalLM`` from another working directory."""
    model = adapted(tmp_path / "dense", **CASES[case])
    monkeypatch.chdir(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained("out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (tmp_path / "out" / BASE_FOLDER / "plan.json").is_file()


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("case", ["llama", "per_layer"])
def test_adapters_load_after_a_move(case, within, tmp_path, monkeypatch):
    """As a whole, with the base in the folder or next to it; another run's model is at the old place meanwhile."""
    model = adapted(tmp_path / "dense", **CASES[case])
    (tmp_path / "run").mkdir()
    if not within:
        model.base_folder = tmp_path / "run/model"
        model._save_base(model.base_folder)
    model.save_pretrained(tmp_path / "run/adapter")
    (tmp_path / "run").rename(tmp_path / "moved")
    save_tiny(tmp_path / "run/model")
    save_tiny(tmp_path / "run/adapter/base")
    monkeypatch.chdir(tmp_path / "moved")
    again = hfprune.load("adapter")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-5)
    again.save_pretrained("adapter")
    monkeypatch.chdir(tmp_path)
    found = AutoPeftModelForCausalLM.from_pretrained("moved/adapter").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-6, rtol=1e-5)


def test_adapters_without_their_base_are_refused_with_the_places(tmp_path):
    model = adapted(tmp_path / "dense")
    model.save_pretrained(tmp_path / "run/adapter")
    (tmp_path / "run/adapter/base").rename(tmp_path / "other")
    with pytest.raises(ConfigError, match="which does not exist. .* hold no model either"):
        hfprune.load(tmp_path / "run/adapter")
    save_tiny(tmp_path / "run/adapter/base", "llama")  # the dense model: its shapes do not fit
    with pytest.raises(ConfigError, match="Cannot load the adapters of"):
        hfprune.load(tmp_path / "run/adapter")


def test_the_card_says_what_the_base_is(tmp_path):
    model = adapted(tmp_path / "dense")
    model.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "pruned LlamaForCausalLM" in card
    assert f"in `{BASE_FOLDER}`" in card
    assert "[More Information Needed]" not in card


def test_a_base_that_is_written_elsewhere_is_named_and_not_written_again(tmp_path):
    model = adapted(tmp_path / "dense")
    model.base_folder = tmp_path / "model"
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / BASE_FOLDER).exists()
    assert str(tmp_path / "model") in (tmp_path / "adapter/adapter_config.json").read_text()


def test_the_model_stays_one_of_peft(tmp_path):
    """Copies, pickles and merging work as with PEFT's class."""
    model = adapted(tmp_path / "dense")
    assert isinstance(model, PeftModelForCausalLM)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
    expected = logits(model)
    torch.testing.assert_close(logits(merge_lora(model)), expected, atol=1e-5, rtol=1e-5)
