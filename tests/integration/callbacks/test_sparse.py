"""Sparse pruning within fit, and recovery that leaves zeros zero, as users reach them."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from hfprune import LoraRecovery, PruningModule, ReportCallback, SparsePruningCallback
from hfprune.callbacks.sparse import check_sparse_strategy
from hfprune.io.load import load_causal_lm
from hfprune.models.forward import sequences
from hfprune.models.groups import find_layers
from hfprune.models.projection import weight_of
from hfprune.sparse import SavedLayers, SparseGPT, Sparsity, Wanda
from hfprune.sparse.engine import prune_sparse
from hfprune.sparse.statistics import projections
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.foreign import Classifier, FineTuner
from tests.helpers.models import save_tiny, tiny, token_ids
from tests.integration.callbacks.test_fit import data, trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(
    folder, callback, *, out=None, callbacks=(), module=None, prune=False, ckpt_path=None, datamodule=None, **kwargs
):
    module = module or PruningModule(folder, learning_rate=1e-2)
    report = [ReportCallback(str(out), latency=False, overwrite=ckpt_path is not None)] if out else []
    runner = trainer(*report, callback, *callbacks, **kwargs)
    torch.manual_seed(0)
    (runner.prune if prune else runner.fit)(module, datamodule=datamodule or data(), ckpt_path=ckpt_path)
    return module, runner


def wanda(**kwargs):
    return SparsePruningCallback(**{"method": "wanda", "sparsity": "2:4"} | kwargs)


def zeros_of(model):
    return [weight_of(m) == 0 for layer in find_layers(model) for m in projections(layer).values()]


def by_hand(folder):
    """The pass over the calibration data, without Lightning."""
    found, source = data(), PruningModule(folder)
    found.bind(source.tokenizer, vocab_size=source.vocab_size, max_positions=source.max_positions)
    batches = [sequence for batch in found.calibration_dataloader() for sequence in sequences(batch)]
    model = load_causal_lm(folder).eval()
    list(prune_sparse(model, batches, Wanda(), Sparsity.parse("2:4"), update=SparseGPT()))
    return model


def test_prune_exports_what_the_engine_makes(folder, tmp_path):
    callback = wanda(update="sparsegpt")
    fit(folder, callback, out=tmp_path / "out", prune=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    for (name, value), other in zip(saved.named_parameters(), by_hand(folder).parameters(), strict=True):
        assert torch.equal(value, other), name
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["saved"]["sparsity"]["achieved"] == 0.5
    assert report["saved"]["sparsity"]["groups_with_n_zeros"] == 5760 / 4
    layer = report["plan"]["sparsity"]["layers"][1]
    assert layer["matrices"]["mlp.up_proj"] == {"asked": "2:4", "weights": 384, "zeros": 192, "permuted": False}
    assert layer["error"] == callback.layers[1].error > 0
    assert report["plan"]["criterion"]["name"] == "Wanda"
    assert list(report["stages"]) == ["dense", "pruned"]
    with pytest.raises(ConfigError, match=r"already pruned \(sparsity=2:4\)"):
        PruningModule(str(tmp_path / "out/model"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_adapters_leave_zeros_zero(tmp_path, name):
    folder = save_tiny(tmp_path / "dense", name)
    callback = wanda(recovery=LoraRecovery(rank=2, dropout=0.0))
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    module, runner = fit(folder, callback, callbacks=[checkpoint])
    assert runner.global_step == 3
    before = tiny(name, dtype=torch.float32)
    ids = token_ids()
    module.eval()
    with torch.no_grad():
        unmerged = module.model(input_ids=ids).logits
    again = PruningModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt")  # adapters are masked there too
    for found in (module, again):
        model = found.unwrap()
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, unmerged, atol=1e-5, rtol=1e-5)
        for zeros in zeros_of(model):
            assert (zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    moved = [
        float((weight_of(a) - weight_of(b)).detach().abs()[weight_of(a) != 0].max())
        for x, y in zip(find_layers(module.model), find_layers(before), strict=True)
        for a, b in zip(projections(x).values(), projections(y).values(), strict=True)
    ]
    assert min(moved) > 1e-5  # all of them were trained


def test_training_all_weights_leaves_zeros_zero(folder, tmp_path):
    module, runner = fit(folder, wanda(), out=tmp_path / "out")
    assert runner.global_step == 3
    assert all((zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all() for zeros in zeros_of(module.model))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["saved"]["sparsity"]["achieved"] == 0.5
    free, _ = fit(folder, wanda(keep_zeros=False), out=tmp_path / "free")
    assert not any(zeros.any() for zeros in zeros_of(free.model))
    assert "sparsity" not in json.loads((tmp_path / "free/report.json").read_text())["saved"]


def test_finished_layers_wait_until_the_run_has_ended(folder, tmp_path):
    undisturbed, _ = fit(folder, wanda(), prune=True)

    class Stopped(Exception):
        pass

    class Stopping(SparsePruningCallback):
        def _plan(self, *args):
            raise Stopped  # every layer is done

    with pytest.raises(Stopped):
        fit(folder, Stopping(method="wanda", sparsity="2:4", state_dir=tmp_path / "layers"), prune=True)
    assert len(list((tmp_path / "layers").glob("layer-*"))) == 3
    with pytest.raises(ConfigError, match="pruned with sparsity 2:4; this run has 0.5"):
        fit(folder, wanda(sparsity=0.5, state_dir=tmp_path / "layers"), prune=True)
    with pytest.raises(ConfigError, match="pruned with data"):
        fit(folder, wanda(state_dir=tmp_path / "layers"), prune=True, datamodule=data(calibration_sequences=5))
    callback = wanda(state_dir=tmp_path / "layers")
    module, _ = fit(folder, callback, prune=True)
    assert all(layer.resumed for layer in callback.layers)
    assert not (tmp_path / "layers").exists()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), undisturbed.parameters(), strict=True))


def test_the_model_inside_a_module_of_ones_own():
    module = FineTuner(lr=1e-2)
    trainer(wanda(calibration_batches=2), limit_train_batches=2, limit_val_batches=0).fit(module)
    assert all((zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all() for zeros in zeros_of(module.net["lm"]))


def test_refusals(folder):
    with pytest.raises(ConfigError, match="holds no supported Hugging Face model"):
        trainer(wanda(calibration_batches=2)).fit(Classifier())
    with pytest.raises(ConfigError, match="16 inputs, not a multiple of 5"):
        fit(folder, wanda(sparsity="2:5"), prune=True)
    sharded = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(
        ConfigError, match="Wanda runs layer by layer, which is not supported under ModelParallelStrategy"
    ):
        check_sparse_strategy(sharded, "Wanda")
    with pytest.raises(ConfigError, match="^calibration_batches=0 must be positive"):
        wanda(calibration_batches=0)
    with pytest.raises(ConfigError, match="prune needs a callback that prunes before training"):
        trainer().prune(PruningModule(folder), data())


def test_activations_that_are_not_finite_leave_no_model(folder, tmp_path):
    module = PruningModule(folder)
    module.configure_model()
    with torch.no_grad():
        module.model.model.layers[1].post_attention_layernorm.weight[0] = torch.inf
    with pytest.raises(CalibrationError, match="layer 1: activations are not finite"):
        fit(folder, wanda(), prune=True, module=module)


def test_sparsity_zero_changes_nothing(folder):
    module, _ = fit(folder, wanda(method="sparsegpt", sparsity=0), prune=True)
    dense = load_causal_lm(folder)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), dense.parameters(), strict=True))


def test_fresh_is_part_of_state_dir(tmp_path):
    asked = {"method": "wanda", "sparsity": 0.5}
    with pytest.warns(DeprecationWarning, match=r"write state_dir=SavedLayers\(folder=\.\.\., fresh=True\)"):
        old = SparsePruningCallback(**asked, state_dir=tmp_path, fresh=True)
    new = SparsePruningCallback(**asked, state_dir=SavedLayers(folder=tmp_path, fresh=True))
    assert (old.state_dir, old.fresh) == (new.state_dir, new.fresh) == (tmp_path, True)
    assert not SparsePruningCallback(**asked, state_dir=str(tmp_path)).fresh
    with pytest.warns(DeprecationWarning, match="`fresh` is deprecated"):
        assert SparsePruningCallback(**asked, fresh=True).state_dir is None
