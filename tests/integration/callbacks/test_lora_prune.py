"""LoRAPrune: importance against loops, the schedule, a run by hand, masks and surgery, resume, refusals."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from transformers import AutoModelForCausalLM

from hfprune import LoraPruningCallback, LoraRecovery, PruneTrainer, PruningModule, ReportCallback, TextDataModule
from hfprune.allocation import Explicit, GlobalRank, Protected, Uniform
from hfprune.cli import main
from hfprune.criteria.lora_gradient import unit_importance, weight_importance
from hfprune.models import find_groups, parameter_count
from hfprune.recovery.lora import add_lora
from hfprune.utils.errors import ConfigError, UnsupportedArchitectureError
from tests.helpers.models import save_tiny, tiny, token_ids
from tests.helpers.stops import Stop, StopAt
from tests.reference import lora_prune as slow

pytestmark = pytest.mark.usefixtures("undrawn")

LORA = LoraRecovery(rank=2, alpha=4, dropout=0.0)
DATA = {"seq_len": 16, "batch_size": 2, "recovery_sequences": 20, "validation_sequences": 1}


@pytest.mark.parametrize("term", ["dB A", "B dA", "dB dA", "W", "B A"])
def test_importance_of_weights_equals_loops_and_has_every_term(term):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (5, 4), "A": (2, 4), "B": (5, 2), "dA": (2, 4), "dB": (5, 2)}
    t = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    found = weight_importance(t["W"], t["A"], t["B"], t["dA"], t["dB"], 2.0)
    expected = slow.importance(*(t[name].tolist() for name in ("W", "A", "B", "dA", "dB")), 2.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    gradient = {"dB A": t["dB"] @ t["A"], "B dA": t["B"] @ t["dA"], "dB dA": -t["dB"] @ t["dA"]}
    whole = {"W": t["W"], "B A": 2.0 * t["B"] @ t["A"]}
    gradient.pop(term, None)
    whole.pop(term, None)
    assert not torch.allclose(found, (sum(gradient.values()) * sum(whole.values())).abs())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_importance_of_units_equals_loops(name):
    model = tiny(name)
    groups = find_groups(model, ("mlp", "heads"))
    wrapped = add_lora(model, LORA).double()
    for n, p in wrapped.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    ids = token_ids()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    base = wrapped.get_base_model()
    for group in groups:
        matrices = []
        for part in group.slices:
            layer = base.get_submodule(part.module)
            weight = layer.base_layer.weight.detach()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            parts = (weight.T if name == "gpt2" else weight, a.detach(), b.detach(), a.grad, b.grad)
            owned = [part.channels([unit]) for unit in range(group.num_units)]
            matrices.append((slow.importance(*(x.tolist() for x in parts), 2.0), part.side == "out", owned))
        expected = torch.tensor(slow.by_unit(matrices), dtype=torch.float64)
        torch.testing.assert_close(unit_importance(base, group), expected, rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), dtype=torch.float64)


def fit(folder, *callbacks, out=None, ckpt_path=None, data=None, trainer=None, dtype="float64", **options):
    module = PruningModule(folder, dtype=dtype, learning_rate=5e-3)
    settings = {"pruning_ratio": 0.25, "lora": LORA, "every": 2} | options
    pruning = LoraPruningCallback(**settings)
    report = [ReportCallback(str(out), latency=False, overwrite=True)] if out else []
    found = PruneTrainer(**{
        "callbacks": [pruning, *report, *callbacks], "accelerator": "cpu", "devices": 1, "logger": False,
        "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | (trainer or {}))  # fmt: skip
    torch.manual_seed(0)
    windows = {"eval_windows": 3, "eval_window": 16} if out else {"eval_windows": 0}
    text = TextDataModule(calibration_sequences=2, **DATA | windows | (data or {}))
    found.fit(module, datamodule=text, ckpt_path=ckpt_path)
    return module, pruning


class StopEarly(Callback):
    """Ends the run after a step, as ``max_time`` does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


class Watch(Callback):
    """Notes, after every step, how many units of each group read as zero."""

    def __init__(self, groups):
        self.groups, self.zeros = groups, []

    def on_train_start(self, trainer, pl_module):
        self.rows = {}
        for group in self.groups:
            (part,) = group.inputs()
            layer = pl_module.causal_lm.get_submodule(part.module).base_layer
            layer.register_forward_pre_hook(lambda m, args, name=group.name: self.rows.__setitem__(name, args[0]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        counts = []
        for group in self.groups:
            (part,) = group.inputs()
            silent = (self.rows[group.name].flatten(0, -2) == 0).all(0).unflatten(0, (-1, part.width)).all(-1)
            counts.append(int(silent.sum()))
        self.zeros.append(counts)


def test_units_go_on_a_cubic_schedule_and_are_cut_at_the_end(folder):
    dense = PruningModule(folder)
    dense.configure_model()
    groups = find_groups(dense.causal_lm, ("mlp", "heads"))
    watch = Watch(groups)
    module, pruning = fit(folder, watch, every=2, warmup=0.2, cooldown=0.2)
    final = [len(module.plan.keep[g.name]) for g in groups]
    expected, gone = [], [0] * len(groups)
    for step in range(10):  # what is chosen after a step counts from the next one on
        expected.append(gone)
        if 2 <= step + 1 <= 8 and ((step + 1 - 2) % 2 == 0 or step + 1 == 8):
            left = (1 - (step + 1 - 2) / 6) ** 3
            gone = [g.num_units - f - round((g.num_units - f) * left) for g, f in zip(groups, final, strict=True)]
    assert watch.zeros == expected
    assert watch.zeros[-1] == [g.num_units - f for g, f in zip(groups, final, strict=True)] != [0] * len(groups)
    assert parameter_count(module.causal_lm) == pruning._resolved.params < parameter_count(dense.causal_lm)
    assert module.lora is None
    assert not any("lora" in name for name, _ in module.named_parameters())


def test_a_run_by_hand(folder):
    """AdamW, running mean and masks in a loop of its own: the same units and the same weights."""
    module, pruning = fit(folder, units=("mlp",), every=3, warmup=0.2, cooldown=0.2)
    data = TextDataModule(calibration_sequences=2, eval_windows=0, **DATA)
    data.bind(module.tokenizer, vocab_size=61, max_positions=64)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    groups = find_groups(dense, ("mlp",))
    model = add_lora(dense, LORA, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    mean, off = {}, {g.name: [] for g in groups}
    base = model.get_base_model()

    def silence(layer, args, name):
        x = args[0].clone()
        x[..., off[name]] = 0
        return (x,)

    for g in groups:
        layer = base.get_submodule(f"{g.name}.down_proj")
        layer.register_forward_pre_hook(lambda layer, args, name=g.name: silence(layer, args, name))
    final = pruning._resolved.widths
    for step, batch in enumerate(data.train_dataloader()):
        optimizer.param_groups[0]["lr"] = (
            5e-3 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / 10).double())))
        )
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()).backward()
        for g in groups:
            now = unit_importance(base, g)
            mean[g.name] = 0.1 * now + 0.9 * mean.get(g.name, torch.zeros_like(now))
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if 2 <= done <= 8 and ((done - 2) % 3 == 0 or done == 8):
            for g, width in zip(groups, final, strict=True):
                number = width + round((g.num_units - width) * (1 - (done - 2) / 6) ** 3)
                order = sorted(range(g.num_units), key=lambda u, s=mean[g.name]: (-float(s[u]), u))
                off[g.name] = sorted(order[number:])
    for g, width in zip(groups, final, strict=True):
        order = sorted(range(g.num_units), key=lambda u, s=mean[g.name]: (-float(s[u]), u))
        assert sorted(order[:width]) == list(module.plan.keep[g.name])
        torch.testing.assert_close(pruning.importance[g.name], mean[g.name], rtol=1e-6, atol=1e-9)
    merged = dict(model.merge_and_unload().named_parameters())
    for name, parameter in module.causal_lm.named_parameters():
        if "self_attn" in name:
            torch.testing.assert_close(parameter, merged[name], atol=2e-6, rtol=0)  # adapters are float32


def test_the_published_layers_need_a_layout_and_are_refused_before_anything_runs(folder, tmp_path):
    published = Protected(first=1, last=1, allocation=Uniform())
    with pytest.raises(UnsupportedArchitectureError, match="different numbers of"):
        fit(folder, out=tmp_path, allocation=published, pruning_ratio=0.15)
    assert not (tmp_path / "report.json").exists()
    module, _ = fit(folder, allocation=published, pruning_ratio=0.15)
    widths = [len(units) for name, units in module.plan.keep.items() if "mlp" in name]
    assert widths[0] == widths[2] == 24 > widths[1]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("step", [1, 4, 9])
def test_interrupted_and_resumed_it_ends_the_same(folder, tmp_path, step):
    options = {"lora": LoraRecovery(rank=2, alpha=4, dropout=0.1)}
    straight, first = fit(folder, **options)
    saving = {"dirpath": tmp_path, "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        fit(folder, ModelCheckpoint(**saving), StopAt(step), **options)
    resumed, again = fit(folder, ModelCheckpoint(**saving), ckpt_path=str(tmp_path / "last.ckpt"), **options)
    assert resumed.plan.keep == straight.plan.keep
    assert all(torch.equal(p, again.importance[name]) for name, p in first.importance.items())
    theirs = dict(straight.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.named_parameters())


def test_accumulated_batches_are_one_step(folder):
    watch = Watch(())
    _, one = fit(folder, data={"batch_size": 4})
    _, two = fit(folder, watch, trainer={"accumulate_grad_batches": 2})
    for name, scores in one.importance.items():
        torch.testing.assert_close(two.importance[name], scores, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first steps are skipped
def test_gradients_that_overflowed_are_left_out(tmp_path):
    """A scaler that begins too high skips steps; their gradients are in no score."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, pruning = fit(save_tiny(tmp_path), dtype="float32", trainer={"plugins": [plugin], "max_epochs": 8})
    assert scaler.get_scale() < 2.0**40  # some steps were skipped
    assert all(scores.isfinite().all() for scores in pruning.importance.values())


def test_a_run_that_ends_before_its_schedule_says_so(folder):
    with pytest.warns(UserWarning, match=r"stopped after 3 of 10 steps, before the end of its schedule"):
        fit(folder, StopEarly(3))


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("changed", [{"pruning_ratio": 0.1}, {"units": ("mlp",)}, {"every": 3}])
def test_it_is_resumed_with_the_settings_that_it_was_begun_with(folder, tmp_path, changed):
    saving = {"dirpath": tmp_path, "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        fit(folder, ModelCheckpoint(**saving), StopAt(4))
    with pytest.raises(ConfigError, match="run had other settings"):
        fit(folder, ModelCheckpoint(**saving), ckpt_path=str(tmp_path / "last.ckpt"), **changed)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_resumed_with_another_batch_size_it_keeps_its_schedule(folder, tmp_path):
    """Steps of another size count by epochs: it does not end before its schedule, of which a warning would tell."""
    saving = {"dirpath": tmp_path, "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        fit(folder, ModelCheckpoint(**saving), StopAt(4))
    small = {"batch_size": DATA["batch_size"] // 2}
    module, _ = fit(folder, ModelCheckpoint(**saving), ckpt_path=str(tmp_path / "last.ckpt"), data=small)
    assert module.schedule.offset == 4
    assert module.plan is not None


def test_a_run_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = save_tiny(tmp_path / "dense")
    Path("prune.yaml").write_text("lora_prune: {every: 2, lora: {rank: 2, alpha: 4}, units: [mlp]}\n")
    flags = [f"--data.{name}={value}" for name, value in DATA.items()]
    flags += ["--data.calibration_sequences=2", "--data.eval_windows=3", "--data.eval_window=16", "--latency=false"]
    common = ["fit", f"--model.path={dense}", "--config=prune.yaml", "--pruning_ratio=0.15", *flags]
    common += ["--trainer.enable_progress_bar=false", "--model.learning_rate=0.005"]
    assert main([*common, "--output_dir=out", "--recover_dense=true"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["stages"]) == ["dense", "recovered", "dense_tuned"]
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert parameter_count(model) == report["plan"]["budget"]["params"] == report["saved"]["parameters"]
    assert report["plan"]["recovery"]["while_training"] is True
    assert report["stages"]["recovered"]["optimizer_steps"] == 10
    assert main(["fit", *common[1:], "--output_dir=other", "--trainer.limit_train_batches=0"]) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"units": ("layers",)}, "cannot be masked while adapters train: use mlp, heads or both"),
        ({"warmup": 0.6, "cooldown": 0.5}, "with a sum below"),
        ({"allocation": Explicit(mlp=12), "pruning_ratio": None}, "sets the number of units itself"),
        ({"allocation": GlobalRank()}, "sets widths from scores"),
        ({"lora": LoraRecovery(rank=2, dora=True)}, "plain adapters"),
        ({"lora": LoraRecovery(rank=2, target_modules=["q_proj"])}, "would have none: add them to target_modules"),
        ({"pruning_ratio": 0.99}, "largest possible `pruning_ratio`"),
    ],
)
def test_what_is_refused(folder, options, text):
    with pytest.raises(ConfigError, match=text):
        fit(folder, **options)


def test_the_report_comes_after(folder, tmp_path):
    module = PruningModule(folder)
    callbacks = [ReportCallback(str(tmp_path / "o")), LoraPruningCallback(pruning_ratio=0.2)]
    with pytest.raises(ConfigError, match="must come after LoraPruningCallback"):
        PruneTrainer(callbacks=callbacks, logger=False, accelerator="cpu", max_epochs=1).fit(
            module, datamodule=TextDataModule(eval_windows=0, **DATA)
        )


def test_adapters_are_checked_like_those_of_other_recovery(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"precision='bf16-true' converts all .* adapters included"):
        fit(folder, trainer={"precision": "bf16-true"})
    monkeypatch.setattr(PruningModule, "configure_model", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="'c_fc' matches no projection"):
        fit(folder, lora=LoraRecovery(rank=2, target_modules=["c_fc"]))
