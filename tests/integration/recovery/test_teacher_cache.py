"""The dense model's predictions on disk: the loss from the K most likely tokens, files, runs, and what goes wrong."""

import json
import math
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from hfprune import LoraRecovery, PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.cli import main
from hfprune.models.forward import objective_sum
from hfprune.modules import training_step as steps
from hfprune.objectives.distillation import DistillationObjective, top_kl
from hfprune.objectives.teacher import CachedTopK, DenseModel
from hfprune.objectives.top_k import KnownTop, rounded_top
from hfprune.recovery import DistillationRecovery, teacher_cache
from hfprune.recovery.teacher_cache import TeacherCache, row_names, supervised
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny, token_ids
from tests.helpers.runs import Losses
from tests.helpers.stops import Stop, StopAt
from tests.reference import objectives as reference

pytestmark = pytest.mark.usefixtures("undrawn")


def random_logits(seed, tokens=3, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)


def known(teacher, k, temperature=1.0):
    log_p, tokens = (teacher / temperature).log_softmax(-1).topk(k, -1)
    others = log_p.new_zeros(len(teacher)) if k == teacher.shape[-1] else 1 - log_p.exp().sum(-1)
    return KnownTop(log_p, tokens, others.log())


@pytest.mark.parametrize("k", [1, 3, 6, 7])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 2.0), (0.7, 0.5)])
def test_value_and_gradient(alpha, temperature, k):
    z, teacher, labels = random_logits(0), random_logits(1), torch.tensor([1, 0, 6])
    objective = DistillationObjective(
        alpha=alpha, temperature=temperature, teacher=CachedTopK(lambda batch, valid: None)
    )
    value, grad = objective.value_and_grad(z.clone(), labels, known(teacher, k, temperature))
    for row in range(3):
        y, theirs = int(labels[row]), teacher[row].tolist()

        def loss(x, theirs=theirs, y=y):
            return reference.top_distillation(x, theirs, y, alpha, temperature, k)

        assert float(value[row]) == pytest.approx(loss(z[row].tolist()), abs=1e-12)
        expected = torch.tensor(reference.finite_difference(loss, z[row].tolist()), dtype=torch.float64)
        torch.testing.assert_close(grad[row], expected, atol=1e-7, rtol=0)


def test_it_is_a_lower_bound_that_meets_the_whole():
    z, teacher = random_logits(0, tokens=20), random_logits(1, tokens=20)
    p = teacher.log_softmax(-1)
    whole = (p.exp() * (p - z.log_softmax(-1))).sum(-1)
    values = torch.stack([top_kl(z.clone(), known(teacher, k)).value for k in range(1, 8)])
    assert bool((values.diff(dim=0) >= -1e-12).all())
    torch.testing.assert_close(values[-1], whole, atol=1e-12, rtol=0)
    assert (whole - values[0]).max() > 0.1
    assert bool(top_kl(teacher.clone(), known(teacher, 2)).value.abs().max() < 1e-12)


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("k", [1, 3, 40, 50])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_what_is_rounded_stays_a_distribution(k, scale):
    """Rounding alone costs little, keeps the share of the others, and breaks neither bound nor sum, by loops."""
    teacher, z = (scale * random_logits(seed, tokens=6, vocab=50) for seed in (0, 1))
    values, tokens, odds = rounded_top(teacher, k)
    assert (values.dtype, tokens.dtype, odds.dtype) == (torch.float16, torch.int32, torch.float32)
    top = KnownTop.restored(values, tokens, odds, dtype=torch.float64)
    found = top_kl(z.clone(), top).value
    for row in range(6):
        p, q = (reference.softmax(x[row].tolist()) for x in (teacher, z))
        order = sorted(range(50), key=lambda i: -p[i])[:k]
        assert tokens[row].tolist() == order
        rest = [sum(x[i] for i in range(50) if i not in order) for x in (p, q)]
        kept = top.log_p[row].exp().tolist()
        assert sum(kept) + float(top.log_rest[row].exp()) == pytest.approx(1, abs=1e-12)
        assert float(top.log_rest[row].exp()) == pytest.approx(rest[0], rel=1e-5, abs=1e-30)
        bound = divergence([*(p[i] for i in order), rest[0]], [*(q[i] for i in order), rest[1]])
        assert float(found[row]) == pytest.approx(bound, rel=1e-3, abs=1e-6)
        assert float(found[row]) >= 0
        rounding = sum(p[i] * abs(math.log(p[i] / r)) for i, r in zip(order, kept, strict=True) if p[i] > 1e-12)
        assert rounding <= 2**-11 * sum(2 * p[i] * math.log(p[order[0]] / p[i]) for i in order if p[i] > 1e-12) + 1e-6


def test_a_distribution_is_its_own_nearest_however_it_was_rounded():
    """At k = V nothing but rounding is left, and KL to what was rounded is 0 where the student has just that."""
    top = KnownTop.restored(*rounded_top(random_logits(0, tokens=20), 7), dtype=torch.float64)
    same = torch.empty(20, 7, dtype=torch.float64).scatter_(-1, top.tokens, top.log_p)
    value, grad = top_kl(same.clone(), top)
    assert float(value.abs().max()) < 1e-12
    assert float(grad.abs().max()) < 1e-12


def test_logits_further_apart_than_float16_reaches():
    teacher = torch.tensor([[0.0, -1e5, -2e5, -3e5]])
    value, grad = top_kl(torch.zeros(1, 4), KnownTop.restored(*rounded_top(teacher, 3), dtype=torch.float32))
    assert float(value) == pytest.approx(math.log(4), abs=1e-6)
    assert bool(grad.isfinite().all())


def batches():
    """Two rows of other lengths, padded together; packed rows; rows of which a part is supervised."""
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
    yield {"input_ids": ids[:1], "position_ids": packed}


def opened(folder, **kwargs):
    return TeacherCache(folder, **{"fingerprint": "one", "top_k": 61, "temperature": 1.5} | kwargs)


def test_the_loss_from_disk_is_that_of_the_model_beside(tmp_path):
    student, teacher = tiny("llama_untied_bias", seed=1), tiny("llama_untied_bias", seed=2)
    cache = opened(tmp_path)
    assert cache.fill(lambda: teacher, batches()) == 3
    for batch in batches():
        whole = DistillationObjective(alpha=0.6, temperature=1.5, teacher=DenseModel(teacher))
        top = DistillationObjective(alpha=0.6, temperature=1.5, teacher=CachedTopK(opened(tmp_path).lookup))
        losses = []
        for objective in (whole, top):
            total, valid = objective_sum(student, objective, batch)
            losses.append(float(total.detach() / valid.sum()))
        assert losses[1] == pytest.approx(losses[0], abs=2e-3)  # logits in float16
        assert losses[1] != losses[0]


def test_rows_are_found_whatever_they_are_batched_with(tmp_path):
    teacher = tiny("llama_untied_bias")
    cache = opened(tmp_path, top_k=4)
    cache.fill(lambda: teacher, batches())
    batch = next(iter(batches()))
    both = cache.lookup(batch, supervised(batch))
    alone = []
    for row, length in ((1, 6), (0, 9)):
        one = {name: tensor[row : row + 1, :length] for name, tensor in batch.items() if name != "attention_mask"}
        assert row_names(one, supervised(one)) == row_names(batch, supervised(batch))[row : row + 1]
        alone.append(cache.lookup(one, supervised(one)))
    torch.testing.assert_close(both.log_p, torch.cat([alone[1].log_p, alone[0].log_p]), atol=0, rtol=0)
    assert both.log_p.shape == (6 + 5, 4)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"][:1]).logits[0] / 1.5
    log_p, tokens = logits.log_softmax(-1).topk(4, -1)
    where = supervised(batch)[0]
    assert torch.equal(both.tokens[:6], tokens[where])
    torch.testing.assert_close(both.log_p[:6].double(), log_p[where], atol=5e-3, rtol=1e-3)


def test_only_what_is_missing_is_computed(tmp_path):
    calls = []

    def teacher():
        calls.append(1)
        return tiny("llama_untied_bias")

    first, second = batches()
    assert opened(tmp_path).fill(teacher, [first]) == 2
    assert opened(tmp_path).fill(teacher, [first, first]) == 0
    assert len(calls) == 1
    again = opened(tmp_path)
    assert again.fill(teacher, [first, second]) == 1
    assert len(calls) == 2
    assert opened(tmp_path, fingerprint="another").fill(teacher, [first]) == 2
    assert opened(tmp_path, temperature=1.0).fill(teacher, [first]) == 2
    assert opened(tmp_path, temperature=1.5000001).fill(teacher, [first]) == 2
    assert not list(tmp_path.rglob(".rows*"))


def all_files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("rows-*.safetensors")}


def test_a_run_killed_while_it_wrote_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    """The first file is whole, the second was begun; the third is not there. Other rows beside do not change bits."""
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 2)
    teacher, rows = tiny("llama_untied_bias"), [{"input_ids": token_ids(1, 8, seed=seed)} for seed in range(6)]
    straight = opened(tmp_path / "straight")
    straight.fill(lambda: teacher, rows)

    def killed(tensors, path, metadata, calls=[]):  # noqa: B006
        calls.append(path)
        save_file(tensors, path, metadata=metadata)
        if len(calls) == 2:
            path.with_name(".rows-begun.safetensors").write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", killed)
        cache = opened(tmp_path / "killed")
        with pytest.raises(KeyboardInterrupt):
            cache.fill(lambda: teacher, rows)
    before = all_files(tmp_path / "killed")
    assert len(before) == 1
    resumed = opened(tmp_path / "killed")
    assert resumed.fill(lambda: teacher, list(reversed(rows))) == 4
    after = all_files(tmp_path / "killed")
    assert len(after) == 3
    assert all(after[name] == content for name, content in before.items())
    for row in rows:
        one, two = (cache.lookup(row, supervised(row)) for cache in (straight, resumed))
        assert torch.equal(one.log_p, two.log_p)
        assert torch.equal(one.log_rest, two.log_rest)


def test_a_row_that_supervises_nothing_has_no_predictions(tmp_path):
    labels = token_ids(2, 6)
    labels[1] = -100
    batch = {"input_ids": token_ids(2, 6), "labels": labels}
    cache = opened(tmp_path, top_k=100)  # more than there are tokens
    cache.fill(lambda: tiny("llama_untied_bias"), [batch])
    found = cache.lookup(batch, supervised(batch))
    assert found.log_p.shape == (5, 61)
    assert bool((found.log_rest == -torch.inf).all())


@pytest.mark.parametrize(("old", "new"), [(b'\\":', b'\\";'), (b".value", b".valve"), (b'"crc"', b'"crd"')])
def test_damaged_headers_are_errors(tmp_path, old, new):
    cache, batch = opened(tmp_path), {"input_ids": token_ids(1, 5)}
    cache.fill(lambda: tiny("llama_untied_bias"), [batch])
    (path,) = cache.folder.glob("rows-*.safetensors")
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ConfigError, match=r"cannot be read .* Delete the file"):
        opened(tmp_path).lookup(batch, supervised(batch))


def test_damaged_files_are_errors(tmp_path):
    cache = opened(tmp_path)
    cache.fill(lambda: tiny("llama_untied_bias"), batches())
    (path,) = cache.folder.glob("rows-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ConfigError, match=r"cannot be read .* Delete the file"):
        opened(tmp_path)
    changed = bytearray(whole)
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    bad = opened(tmp_path)

    def read_all():
        return [bad.lookup(batch, supervised(batch)) for batch in batches()]

    with pytest.raises(ConfigError, match="are corrupt. Delete the file"):
        read_all()
    other = {"input_ids": token_ids(1, 5, seed=9)}
    with pytest.raises(ConfigError, match="The data have changed"):
        bad.lookup(other, supervised(other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, distillation, *callbacks, ckpt_path=None, lora=None, precision="32-true", **data):
    module = PruningModule(folder, learning_rate=5e-3, distillation=distillation)
    trainer = PruneTrainer(
        callbacks=[TaylorImportanceCallback(pruning_ratio=0.3, recovery=lora or "full"), *callbacks], accelerator="cpu",
        devices=1, logger=False, max_epochs=2, precision=precision, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    settings = {"seq_len": 16, "calibration_sequences": 4, "batch_size": 4, "recovery_sequences": 12} | data
    trainer.fit(
        module, datamodule=TextDataModule(validation_sequences=4, eval_windows=0, **settings), ckpt_path=ckpt_path
    )
    return module


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_run_with_the_cache_ends_near_one_with_the_model(folder, tmp_path, monkeypatch):
    with_model, from_files, of_text = Losses(), Losses(), Losses()
    fit(folder, DistillationRecovery(), with_model)
    cached = weights(fit(folder, DistillationRecovery(cache=str(tmp_path), top_k=61), from_files))
    fit(folder, None, of_text)
    assert from_files.seen == pytest.approx(with_model.seen, rel=2e-3)  # rounding of what is stored
    assert min(from_files.seen) < 0.99 * from_files.seen[0]  # it has learnt
    assert from_files.seen != pytest.approx(of_text.seen, rel=0.05)
    loads = []
    monkeypatch.setattr(steps, "load_causal_lm", lambda *args, **kwargs: loads.append(1))
    again = weights(fit(folder, DistillationRecovery(cache=str(tmp_path), top_k=61)))
    assert not loads  # the dense model was not needed again
    assert all(torch.equal(p, again[name]) for name, p in cached.items())


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_interrupted_and_resumed_it_ends_the_same(folder, tmp_path):
    data = {"recovery_sequences": 12, "batch_size": 2}
    settings = DistillationRecovery(alpha=0.5, cache=str(tmp_path / "cache"), top_k=8)
    straight = weights(fit(folder, settings, lora=LoraRecovery(rank=2), **data))
    shutil.rmtree(tmp_path / "cache")
    saving = {"dirpath": tmp_path / "ckpt", "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        fit(folder, settings, ModelCheckpoint(**saving), StopAt(2), lora=LoraRecovery(rank=2), **data)
    last = str(tmp_path / "ckpt/last.ckpt")
    saved = next((tmp_path / "cache").rglob("rows-*.safetensors"))
    tensors = load_file(saved)
    shutil.rmtree(tmp_path / "cache")
    resumed = weights(
        fit(folder, settings, ModelCheckpoint(**saving), ckpt_path=last, lora=LoraRecovery(rank=2), **data)
    )
    assert tensors
    assert all(torch.equal(p, resumed[name]) for name, p in straight.items())


def test_what_cannot_be_kept_is_refused_before_anything_runs(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    common = ["fit", f"--model.path={folder}", "--output_dir=out", "--pruning_ratio=0.2", "--data.seq_len=16"]
    common += ["--data.eval_windows=0", "--data.calibration_sequences=4", "--latency=false"]
    assert main([*common, "--model.distillation.cache=file/below"]) == 2
    assert "--model.distillation.cache 'file/below' cannot be written" in " ".join(capsys.readouterr().err.split())
    streaming = ["--data.recovery=builtin", "--data.streaming=true", "--model.distillation.cache=cache"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "some words " * 20}) for _ in range(30)))
    streaming[0] = "--data.recovery=a.jsonl"
    assert main([*common, "--overwrite=true", *streaming, "--trainer.max_steps=2"]) == 2
    assert "requires recovery data in memory" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="top_k=0 must be positive"):
        DistillationRecovery(cache="x", top_k=0)


def test_a_model_with_the_same_weights_that_predicts_otherwise_has_rows_of_its_own(folder, tmp_path):
    """What stands in the config alone, and the precision of the forward pass."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (other / "config.json").write_text(json.dumps(config))
    settings = DistillationRecovery(cache=str(tmp_path / "cache"), top_k=4)

    def folders():
        return {path.name: len(list(path.iterdir())) for path in (tmp_path / "cache").iterdir()}

    fit(folder, settings, recovery_sequences=4)
    assert len(folders()) == 1
    fit(str(other), settings, recovery_sequences=4)
    assert len(folders()) == 2
    fit(folder, settings, recovery_sequences=4, precision="bf16-mixed")
    assert set(folders().values()) == {1}
    assert len(folders()) == 3
    shutil.copytree(folder, tmp_path / "moved")
    fit(str(tmp_path / "moved"), settings, recovery_sequences=4)
    assert set(folders().values()) == {1}
    assert len(folders()) == 3


def test_what_a_token_costs_and_how_near_it_is(tmp_path):
    """2 bytes of logit and 4 of its number a token, 4 for all others; the error is below a thousandth of the value."""
    teacher = tiny("llama_untied_bias")
    cache = opened(tmp_path, top_k=8)
    batch = {"input_ids": token_ids(1, 12)}
    cache.fill(lambda: teacher, [batch])
    (path,) = cache.folder.glob("*.safetensors")
    tensors = load_file(path)
    assert sum(t.nbytes for t in tensors.values()) == 11 * (8 * 6 + 4)
    with torch.no_grad():
        exact = (teacher(input_ids=batch["input_ids"]).logits[0, :-1] / 1.5).log_softmax(-1).topk(8, -1).values
    found = cache.lookup(batch, supervised(batch)).log_p.double()
    assert float(((found - exact) / exact).abs().max()) < 1e-3
