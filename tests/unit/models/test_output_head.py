"""The output head that a table describes is the model's own, or is refused."""

import re
from dataclasses import replace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from hfprune import TaylorImportanceCallback
from hfprune.cli import main
from hfprune.evaluation.fidelity import DenseReference
from hfprune.evaluation.perplexity import Windows
from hfprune.models import ARCHITECTURES, output_head, register
from hfprune.models.architectures import LLAMA
from hfprune.models.forward import objective_sum
from hfprune.models.groups import pin_spec
from hfprune.objectives import OBJECTIVES
from hfprune.utils.errors import UnsupportedArchitectureError
from tests.helpers.models import GATED, MIXTURES, NAMES, tiny, tiny_tokenizer, token_ids

SCALED = {
    "GraniteForCausalLM": (
        GraniteConfig(**GATED, logits_scaling=8.0),
        {"scale_key": "logits_scaling", "scale_divides": True},
        1 / 8,
    ),
    "CohereForCausalLM": (CohereConfig(**GATED, logit_scale=0.0625), {"scale_key": "logit_scale"}, 0.0625),
}


@pytest.fixture
def table():
    """Registers tables for one test."""
    added = []

    def add(name, **fields):
        added.append(name)
        return register(replace(LLAMA, model_class=name, **fields))

    yield add
    for name in added:
        ARCHITECTURES.remove(name)


def scaled(name, dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SCALED[name][0]).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCALED)
def test_a_table_without_the_scale_of_its_class_is_refused(table, name, dtype):
    """Both numbers are in the message, and their ratio is the scale; a second use is refused, too."""
    table(name)
    model = scaled(name, dtype)
    for _ in range(2):
        with pytest.raises(UnsupportedArchitectureError, match="scale_key") as refused:
            output_head(model)
    ours, own = map(float, re.search(r"a logit of (\S+), but the model gives (\S+)\. ", str(refused.value)).groups())
    assert own / ours == pytest.approx(SCALED[name][2], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_a_table_with_the_scale_gives_the_models_logits_and_objective(table, name, dtype):
    table(name, **SCALED[name][1])
    model, ids = scaled(name, dtype), token_ids()
    with torch.no_grad():
        ours = output_head(model).logits(model.model(input_ids=ids).last_hidden_state)
        own = model(input_ids=ids).logits.to(ours.dtype)
        entropy, _ = objective_sum(model, OBJECTIVES.get("entropy"), {"input_ids": ids})
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(ours, own, rtol=tolerance, atol=tolerance * float(own.abs().max()))
    expected = torch.distributions.Categorical(logits=own.double()).entropy().sum()
    assert float(entropy) == pytest.approx(float(expected), rel=tolerance)


@pytest.mark.parametrize("name", NAMES + MIXTURES)
def test_every_table_passes(name):
    output_head(tiny(name, dtype=torch.float32))


def test_a_soft_cap_left_out_is_refused(monkeypatch):
    gemma = ARCHITECTURES.get("Gemma2ForCausalLM")
    monkeypatch.setitem(ARCHITECTURES._items, "Gemma2ForCausalLM", replace(gemma, softcap_key=None))
    with pytest.raises(UnsupportedArchitectureError, match="softcap_key"):
        output_head(tiny("gemma2"))


def test_a_key_that_the_config_lacks_is_named(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES._items, "LlamaForCausalLM", replace(LLAMA, scale_key="logit_scale"))
    with pytest.raises(UnsupportedArchitectureError, match="no 'logit_scale'"):
        output_head(tiny())


def test_the_comparison_leaves_no_trace():
    """Hooks see nothing of it and stay; modes and gradients are as before; it runs once."""
    model, seen = tiny(), []
    model.train()
    model.model.layers[1].eval()
    handle = model.model.layers[0].register_forward_hook(lambda *args: seen.append(args))
    modes = [m.training for m in model.modules()]
    output_head(model)
    assert not seen
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    model(input_ids=token_ids())
    assert len(seen) == 1
    handle.remove()
    model.forward = None  # a second comparison would call it
    output_head(model)


def test_a_wrong_table_is_refused_before_the_model_has_weights(table):
    """The comparison is made on a tiny model of the class."""
    table("GraniteForCausalLM")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SCALED["GraniteForCausalLM"][0])
    with pytest.raises(UnsupportedArchitectureError, match="does not describe its output head"):
        output_head(model)


def test_a_model_without_weights_is_compared_once_it_has_some():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SCALED["GraniteForCausalLM"][0])
    pin_spec(model, replace(LLAMA, model_class="GraniteForCausalLM"))
    assert output_head(model).scale == 1.0
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.apply(model._init_weights)
    with pytest.raises(UnsupportedArchitectureError):
        output_head(model.float())


class Own(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model

    def training_step(self, batch, index):
        return self.net(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader([{"input_ids": row} for row in token_ids(4)], batch_size=2)


def drop_in(model):
    callback = TaylorImportanceCallback(intermediate_size=12, objective="entropy", calibration_batches=1)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, enable_model_summary=False, callbacks=[callback], **settings
    )
    trainer.fit(Own(model))


def collect(model):
    DenseReference.collect(model, Windows.of(token_ids()), copy_head=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("use", [drop_in, collect], ids=["drop_in", "reference"])
def test_python_refuses_a_wrong_head(table, use):
    table("CohereForCausalLM")
    model = scaled("CohereForCausalLM", torch.float32)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(UnsupportedArchitectureError, match="scale_key"):
        use(model)
    assert shapes == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_commands_refuse_a_wrong_head(table, command, tmp_path, capsys):
    table("GraniteForCausalLM")
    folder, text, out = tmp_path / "granite", tmp_path / "text.txt", tmp_path / "out"
    scaled("GraniteForCausalLM", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text.write_text("The assert statement and the while statement.\n\n" * 200)
    arguments = ["--model.path", str(folder), "--data.text", str(text), "--latency", "false"]
    arguments += ["--data.eval_window", "16", "--data.eval_windows", "2"]
    if command == "prune":
        arguments += ["--output_dir", str(out), "--pruning_ratio", "0.1"]
        arguments += ["--data.seq_len", "16", "--data.calibration_sequences", "4"]
    assert main([command, *arguments]) == 2
    assert "scale_key='logit_scale'" in " ".join(capsys.readouterr().err.split())
    assert not (out / "model").exists()
