"""Ways to recover: from the dense model, all weights or the MLPs' alone, adapters of several kinds; each resumed."""

import json
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune import LoraRecovery, PruneTrainer, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule
from hfprune.callbacks import SparsePruningCallback
from hfprune.callbacks.checkpointing import StepCheckpoint
from hfprune.evaluation.perplexity import perplexity
from hfprune.models import find_groups
from hfprune.recovery import DistillationRecovery, add_lora, merge_lora
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny, tiny_tokenizer, token_ids
from tests.helpers.runs import Losses
from tests.helpers.stops import Stop, StopAt

pytestmark = pytest.mark.usefixtures("undrawn")

ADAPTERS = {
    "lora": LoraRecovery(rank=2, dropout=0.1),
    "rslora": LoraRecovery(rank=2, rslora=True),
    "dora": LoraRecovery(rank=2, dora=True),
    "pissa": LoraRecovery(rank=2, init="pissa"),
}
TEACHER = DistillationRecovery(alpha=0.5, temperature=2.0)
HIDDEN = DistillationRecovery(alpha=0.5, hidden=2.0, hidden_layers=(0, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(
    folder, *callbacks, lora=None, out=None, ckpt_path=None, precision="32-true", pruning=None, trainer=None,
    batch_size=4, **options,
):  # fmt: skip
    module = PruningModule(folder, learning_rate=5e-3, **options)
    importance = pruning or TaylorImportanceCallback(pruning_ratio=0.3, recovery=lora or "full")
    report = [ReportCallback(str(out), latency=False, overwrite=True)] if out else []
    trainer = PruneTrainer(
        callbacks=[*report, importance, *callbacks], accelerator="cpu", devices=1, logger=False, max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False, precision=precision,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **(trainer or {}),
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, calibration_sequences=4, batch_size=batch_size, recovery_sequences=12, validation_sequences=4,
        eval_windows=3, eval_window=16,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize(
    ("lora", "options"),
    [
        (None, {"distillation": TEACHER}),
        ("dora", {"distillation": TEACHER}),
        ("rslora", {}),
        ("pissa", {"gradient_checkpointing": True}),
        (None, {"trainable": "mlp"}),
        ("lora", {"distillation": HIDDEN, "gradient_checkpointing": True}),
    ],
    ids=[
        "full from the dense model",
        "dora from the dense model",
        "rslora",
        "pissa, layers run again",
        "mlp",
        "lora towards hidden states, layers run again",
    ],
)
def test_interrupted_and_resumed_it_ends_the_same(folder, tmp_path, lora, options):
    lora = ADAPTERS[lora] if lora else None
    straight = fit(folder, lora=lora, **options)
    saving = {"dirpath": tmp_path / "ckpt", "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        fit(folder, ModelCheckpoint(**saving), StopAt(4), lora=lora, **options)
    last = str(tmp_path / "ckpt/last.ckpt")
    assert not any("teacher" in name for name in torch.load(last, weights_only=True)["state_dict"])
    resumed = fit(folder, ModelCheckpoint(**saving), lora=lora, ckpt_path=last, **options)
    assert resumed.trainer.global_step == 6
    theirs = dict(straight.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.named_parameters())


class StopAtBatch(Callback):
    """Leaves before a batch, counted from the start of the fit."""

    def __init__(self, number):
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            raise Stop


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize(
    ("accumulate", "stops", "saving", "trainer"),
    [
        (3, (7, 8), {"every_n_train_steps": 1}, {}),  # the batch after a resume still has the number of the step before
        (2, (7, 10), {}, {"val_check_interval": 3}),  # validations within steps
    ],
)
def test_interrupted_twice_within_accumulated_steps_it_ends_the_same(
    folder, tmp_path, accumulate, stops, saving, trainer
):
    options = {"lora": ADAPTERS["lora"], "batch_size": 1}
    options["trainer"] = {"accumulate_grad_batches": accumulate} | trainer
    straight = fit(folder, **options)
    last = str(tmp_path / "last.ckpt")
    for number, path in zip(stops, (None, last), strict=True):
        with pytest.raises(Stop):
            fit(
                folder,
                StepCheckpoint(tmp_path, save_last=True, **saving),
                StopAtBatch(number),
                ckpt_path=path,
                **options,
            )
    resumed = fit(folder, StepCheckpoint(tmp_path, save_last=True, **saving), ckpt_path=last, **options)
    assert resumed.trainer.global_step == straight.trainer.global_step
    assert resumed.trained_tokens == straight.trained_tokens
    theirs = dict(straight.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.named_parameters())


def test_the_dense_model_leads(folder, tmp_path):
    """Recovery towards it ends nearer to it than recovery on the text, and the report says what was done."""
    ends = {}
    for name, distillation in {"text": None, "dense": DistillationRecovery()}.items():
        fit(folder, out=tmp_path / name, distillation=distillation)
        report = json.loads((tmp_path / name / "report.json").read_text())
        ends[name] = report["stages"]["recovered"]["fidelity"]["kl"]
        assert report["distillation"] == (None if distillation is None else distillation.to_dict())
        assert report["stages"]["recovered"]["supervised_tokens"] == 2 * 12 * 15
    assert ends["dense"] < 0.9 * ends["text"]


def test_only_mlps_are_trained(folder):
    module, start = fit(folder, trainable="mlp"), PruningModule(folder)
    start.configure_model()
    start.apply_plan(module.plan)
    parts = {part.module for group in find_groups(start.causal_lm) for part in group.slices}
    before = dict(start.causal_lm.named_parameters())
    for name, parameter in module.causal_lm.named_parameters():
        assert torch.equal(parameter, before[name]) != (name.rpartition(".")[0] in parts)


def test_half_precision_weights_are_not_trained(folder):
    """Adapters are float32 whatever is under them."""
    with pytest.raises(ConfigError, match="precision=.bf16-mixed"):
        fit(folder, dtype="bfloat16")
    module = fit(folder, dtype="bfloat16", lora=ADAPTERS["lora"])
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("lora", [None, "lora"])
def test_a_trainer_that_makes_all_of_it_half_is_refused(folder, lora):
    """Lightning would convert adapters, too."""
    with pytest.raises(ConfigError, match=r"precision='bf16-true' converts all .* adapters included"):
        fit(folder, lora=ADAPTERS[lora] if lora else None, precision="bf16-true")


def test_weights_that_lost_single_weights_are_not_trained_in_half_precision(folder):
    with pytest.raises(ConfigError, match="precision=.bf16-mixed"):
        fit(folder, pruning=SparsePruningCallback(method="magnitude", sparsity=0.5), dtype="bfloat16")


def test_adapters_leave_no_choice_of_weights(folder):
    with pytest.raises(ConfigError, match="trainable=.mlp. .* without adapters"):
        fit(folder, lora=ADAPTERS["lora"], trainable="mlp")


@pytest.mark.parametrize(("target", "text"), [("lm_head", "is the output head"), ("c_fc", "It has: .*up_proj")])
@pytest.mark.parametrize("sparse", [False, True])
def test_targets_are_checked_before_anything_is_loaded(folder, monkeypatch, target, text, sparse):
    monkeypatch.setattr(PruningModule, "configure_model", lambda self: pytest.fail("the model was loaded"))
    lora = LoraRecovery(rank=2, target_modules=["q_proj", target])
    pruning = SparsePruningCallback(method="magnitude", sparsity=0.5, recovery=lora or "full") if sparse else None
    with pytest.raises(ConfigError, match=f"'{target}'.*{text}"):
        fit(folder, lora=lora, pruning=pruning)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("sparse", [False, True])
def test_it_is_resumed_with_the_adapters_that_it_was_begun_with(folder, tmp_path, sparse):
    def begun(lora, *callbacks, **options):
        pruning = SparsePruningCallback(method="magnitude", sparsity=0.5, recovery=lora or "full") if sparse else None
        return fit(folder, *callbacks, lora=lora, pruning=pruning, **options)

    saving = {"dirpath": tmp_path / "ckpt", "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        begun(ADAPTERS["lora"], ModelCheckpoint(**saving), StopAt(2))
    last = str(tmp_path / "ckpt/last.ckpt")
    for other in (None, LoraRecovery(rank=3)):
        with pytest.raises(ConfigError, match=r"recovered with LoraRecovery\(rank=2.*this run has"):
            begun(other, ModelCheckpoint(**saving), ckpt_path=last)
    resumed = begun(LoraRecovery(rank=2, dropout=0.1), ModelCheckpoint(**saving), ckpt_path=last)
    assert resumed.trainer.global_step == 6


@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_pruned_by_an_earlier_call_gets_its_adapters(folder, sparse):
    pruning = (
        SparsePruningCallback(method="magnitude", sparsity=0.5)
        if sparse
        else TaylorImportanceCallback(pruning_ratio=0.3)
    )

    def trainer():
        return PruneTrainer(
            callbacks=[pruning], accelerator="cpu", devices=1, logger=False, max_epochs=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip

    module = PruningModule(folder, learning_rate=5e-3)
    data = TextDataModule(seq_len=16, calibration_sequences=4, recovery_sequences=8, eval_windows=0)
    trainer().prune(module, datamodule=data)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    pruning.recovery = ADAPTERS["lora"]
    trainer().fit(module, datamodule=data)
    assert module.lora == ADAPTERS["lora"]
    now = dict(module.causal_lm.named_parameters())
    for name, weight in before.items():
        plain = name.removeprefix("model.")
        base = now.get(plain, now.get(plain.replace(".weight", ".base_layer.weight")))
        assert torch.equal(base, weight)
    assert all(p.abs().max() > 0 for name, p in module.named_parameters() if "lora_B" in name)
    merged = dict(module.unwrap().named_parameters())
    zeros = {name: weight == 0 for name, weight in before.items() if sparse and "layers" in name}
    assert all((merged[name.removeprefix("model.")][zero] == 0).all() for name, zero in zeros.items())


def test_bad_settings(folder):
    with pytest.raises(ConfigError, match="alpha="):
        DistillationRecovery(alpha=2.0)
    with pytest.raises(ConfigError, match="trainable"):
        PruningModule(folder, trainable="heads")


@pytest.mark.parametrize("lora", [None, "lora"])
def test_layers_run_again_give_the_same_weights(folder, lora):
    """Gradient checkpointing changes what is kept, not what is computed, dropout included; calibration does without."""
    calls = []

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            layer = pl_module.causal_lm.model.layers[0].mlp
            layer.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))

    ends = []
    for again in (False, True):
        calls.clear()
        module = fit(folder, Count(), lora=ADAPTERS[lora] if lora else None, gradient_checkpointing=again)
        ends.append((dict(module.named_parameters()), sum(calls)))
        assert not any(layer.gradient_checkpointing for layer in module.causal_lm.model.layers)
    (one, once), (two, twice) = ends
    assert all(torch.equal(p, two[name]) for name, p in one.items())
    assert twice == 2 * once > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pissa_starts_where_the_model_was_and_moves_its_largest_directions(name):
    model, plain = tiny(name, dtype=torch.float32), tiny(name, dtype=torch.float32)
    ids = token_ids()
    wrapped = add_lora(model, LoraRecovery(rank=2, alpha=4, dropout=0.0, init="pissa"))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, plain(ids).logits, atol=1e-4, rtol=0)
    weights = dict(plain.named_parameters())
    layers = [(n, m) for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)]
    for layer_name, layer in layers:
        dense = weights[layer_name.removeprefix("base_model.model.") + ".weight"]
        dense = dense.T if name == "gpt2" else dense
        u, s, v = torch.linalg.svd(dense.detach())
        update = layer.get_delta_weight("default")
        update = update.T if name == "gpt2" else update
        torch.testing.assert_close(update, u[:, :2] * s[:2] @ v[:2], atol=1e-4, rtol=0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        tuned = wrapped(ids).logits
        torch.testing.assert_close(merge_lora(wrapped)(ids).logits, tuned, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21
def test_pissa_adapters_and_their_base_are_exported_together(folder, tmp_path):
    module = PruningModule(folder, learning_rate=5e-3)
    importance = TaylorImportanceCallback(pruning_ratio=0.3, recovery=ADAPTERS["pissa"])
    report = ReportCallback(str(tmp_path / "out"), latency=False, merge_adapters=False)
    trainer = PruneTrainer(
        callbacks=[report, importance], accelerator="cpu", devices=1, logger=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = TextDataModule(seq_len=16, calibration_sequences=4, recovery_sequences=8, eval_windows=3, eval_window=16)
    trainer.fit(module, datamodule=data)
    stages = json.loads((tmp_path / "out/report.json").read_text())["stages"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    both = PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    windows = data.evaluation_windows()
    found = perplexity(both.merge_and_unload(), windows).value
    assert found == pytest.approx(stages["recovered"]["perplexity"]["value"], rel=1e-4)


def test_pissa_and_dora_are_refused_where_zeros_must_stay():
    with pytest.raises(ConfigError, match="init='pissa' subtracts singular directions from the weights"):
        SparsePruningCallback(method="wanda", sparsity=0.5, recovery=ADAPTERS["pissa"])
    with pytest.raises(ConfigError, match="dora=True scales whole columns"):  # its sizes would not have been trained
        SparsePruningCallback(method="wanda", sparsity=0.5, recovery=ADAPTERS["dora"])
    for name in ("pissa", "dora"):
        SparsePruningCallback(method="wanda", sparsity=0.5, recovery=ADAPTERS[name], keep_zeros=False)
    with pytest.raises(ConfigError, match="does not support float64"):
        add_lora(tiny(), ADAPTERS["pissa"])
    with pytest.raises(ConfigError, match="init='svd' is not one of default, pissa"):
        LoraRecovery(init="svd")


def test_an_optimizer_whose_library_is_missing_is_an_error_at_once(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"requires bitsandbytes \(pip install bitsandbytes\)"):
        PruningModule(folder, optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match="'sgd' is not one of adamw, adamw_8bit"):
        PruningModule(folder, optimizer="sgd")


def test_moments_of_8_bits_are_refused_where_weights_are_sharded(folder):
    module = PruningModule(folder)
    module.optimizer_name = "adamw_8bit"  # whether or not its library is here
    module._device_mesh = {"data_parallel": object()}
    with pytest.raises(ConfigError, match="adamw_8bit' requires unsharded weights"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_moments_of_8_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    saving = {"dirpath": tmp_path / "ckpt", "save_last": True, "every_n_train_steps": 1}
    narrow, wide = Losses(), Losses()
    straight = fit(str(tmp_path / "m"), narrow, optimizer="adamw_8bit")
    states = straight.optimizers().optimizer.state
    assert any(state["state1"].dtype == torch.uint8 for state in states.values())
    fit(str(tmp_path / "m"), wide)
    assert narrow.seen == pytest.approx(wide.seen, rel=1e-2)
    assert min(wide.seen) < 0.95 * wide.seen[0]  # the weights have moved
    with pytest.raises(Stop):
        fit(str(tmp_path / "m"), ModelCheckpoint(**saving), StopAt(4), optimizer="adamw_8bit")
    last = str(tmp_path / "ckpt/last.ckpt")
    resumed = fit(str(tmp_path / "m"), ModelCheckpoint(**saving), ckpt_path=last, optimizer="adamw_8bit")
    theirs = dict(straight.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.named_parameters())


@pytest.mark.parametrize("cached", [False, True])
def test_terms_of_a_mixture_are_logged_under_their_own_names(folder, tmp_path, cached):
    """``train_loss`` is the mixture, ``val_loss`` cross-entropy: what compares is called alike."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    cache = {"cache": str(tmp_path / "cache"), "top_k": 61} if cached else {}
    settings = DistillationRecovery(alpha=0.25, temperature=2.0, **cache)
    module = fit(folder, Look(), lora=LoraRecovery(rank=2), distillation=settings)
    for found in seen:
        mixture = 0.75 * found["train_ce"] + 0.25 * 4 * found["train_kl"]
        assert found["train_loss"] == pytest.approx(mixture, rel=1e-4)
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert metrics["val_loss"] == metrics["val_ce"] > 1
    assert ("val_kl" in metrics) != cached
    plain = fit(folder, lora=LoraRecovery(rank=2)).trainer.callback_metrics
    assert not {"train_kl", "train_ce", "val_kl", "val_ce"} & set(plain)
