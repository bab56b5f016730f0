import json
import math
import os
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics import MetricCollection
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune.evaluation import DenseReference, FidelityMetric, Windows, fidelity, measure
from hfprune.evaluation.cache import cached_reference, collect_top_k
from hfprune.evaluation.divergence import QUANTITIES, TopK, divergences
from hfprune.evaluation.fidelity import TopLogits
from hfprune.models.fingerprint import fingerprint
from hfprune.utils.errors import ConfigError
from tests.helpers import warm
from tests.helpers.models import GATED, tiny, token_ids
from tests.reference import divergences as reference
from tests.unit.evaluation.test_fidelity import perturbed


def logits(*shape, seed=0, dtype=torch.float64):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected(dense, other):
    rows = [reference.token(a, b) for a, b in zip(dense.tolist(), other.tolist(), strict=True)]
    return torch.tensor([[row[name] for name in QUANTITIES] for row in rows], dtype=torch.float64)


def test_divergences_equal_the_loop():
    dense = logits(20, 40)
    other = dense + logits(20, 40, seed=1) / 3
    torch.testing.assert_close(divergences(dense, other), expected(dense, other), rtol=0, atol=1e-12)
    found = divergences(dense, other)
    assert not torch.allclose(found[:, 0], found[:, 1])  # the two KLs are told apart
    assert 0 < found[:, 3].mean() < 1
    assert 0 < found[:, 4].mean() < 1


def test_float32_is_near():
    dense = logits(20, 1000)
    other = dense + logits(20, 1000, seed=1) / 3
    found = divergences(dense.float(), other.float())
    torch.testing.assert_close(found[:, :3], divergences(dense, other)[:, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_differs_from_itself(dtype):
    z = logits(6, 300, dtype=dtype) * 5
    assert divergences(z, z).tolist() == [[0, 0, 0, 1, 1, 1]] * 6
    assert divergences(z, z.clone() + 0).tolist() == [[0, 0, 0, 1, 1, 1]] * 6


def test_the_farthest_distributions():
    z = torch.full((1, 30), -2000.0, dtype=torch.float64)
    one, other = z.clone(), z.clone()
    one[0, 3] = other[0, 20] = 0.0
    found = dict(zip(QUANTITIES, divergences(one, other)[0].tolist(), strict=True))
    assert found["kl"] == pytest.approx(2000)
    assert found["js_distance"] == pytest.approx(math.sqrt(math.log(2)), abs=1e-12)
    assert found["top1_agreement"] == 0


def test_impossible_tokens():
    full = logits(4, 30)
    both, only_dense, only_other = full.clone(), full.clone(), full + 0.1 * logits(4, 30, seed=2)
    both[:, 25:] = only_dense[:, 25:] = -math.inf
    other = only_other.clone()
    other[:, 25:] = -math.inf
    cut = divergences(full[:, :25], only_other[:, :25])
    torch.testing.assert_close(divergences(both, other), cut)
    found = divergences(only_dense, only_other)
    assert found[:, 0].isfinite().all()
    assert (found[:, 1] == math.inf).all()
    assert found[:, 2].isfinite().all()
    assert (divergences(only_other, only_dense)[:, 0] == math.inf).all()
    p, q = (z.softmax(-1) for z in (only_dense, only_other))
    m = (p + q) / 2
    js = (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).sum(-1) / 2
    torch.testing.assert_close(found[:, 2], js.sqrt())


def test_nan_stays():
    z, bad = logits(2, 30), logits(2, 30)
    bad[1, 4] = math.nan
    for found in (divergences(z, bad), divergences(bad, z)):
        assert found[0, :3].isfinite().all()
        assert found[1, :3].isnan().all()


def test_of_the_top_k_a_lower_bound():
    dense = logits(20, 60)
    other = dense + logits(20, 60, seed=1) / 3
    exact = divergences(dense, other)
    whole = divergences(TopK.of(dense, 60), other)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-7)
    coarse = divergences(TopK.of(dense, 20), other)
    assert (coarse[:, :3] <= exact[:, :3] + 1e-12).all()
    assert (coarse[:, :3].mean(0) > 0.5 * exact[:, :3].mean(0)).all()
    assert torch.equal(coarse[:, 3:], exact[:, 3:])
    order = dense.argsort(dim=-1, descending=True)[:, :20]
    p, q = dense.softmax(-1).gather(1, order), other.softmax(-1).gather(1, order)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    torch.testing.assert_close(coarse[:, 0], (p * (p / q).log()).sum(-1), rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigError, match="15 are compared"):
        divergences(TopK.of(dense, 10), other)


def test_metric_means_and_standard_errors():
    dense = logits(5, 7, 40)
    other = dense + logits(5, 7, 40, seed=1) / 3
    metric = FidelityMetric()
    metric.update(dense[:2], other[:2])
    for one, two in zip(dense[2:], other[2:], strict=True):
        metric.update(one, two)
    found = metric.compute()
    by_token = torch.stack([expected(a, b) for a, b in zip(dense, other, strict=True)])
    for column, name in enumerate(QUANTITIES):
        means = by_token[..., column].mean(1).tolist()
        assert found[name].item() == pytest.approx(statistics.fmean(means), abs=1e-9)
        assert found[f"{name}_stderr"].item() == pytest.approx(statistics.stdev(means) / 5**0.5, abs=1e-9)
    torch.testing.assert_close(found["kl_by_position"], by_token[..., 0].mean(0), rtol=0, atol=1e-9)
    result = metric.result()
    assert (result.num_tokens, result.num_windows, result.dense_top_k) == (35, 5, None)
    assert result.kl == found["kl"].item()
    metric.reset()
    with pytest.warns(UserWarning, match="before the"), pytest.raises(ConfigError, match="No window"):
        metric.compute()


def test_metric_in_a_collection_and_pickled():
    import pickle

    dense, other = logits(2, 7, 40), logits(2, 7, 40, seed=1)
    collection = MetricCollection({"fidelity": FidelityMetric()})
    collection.update(dense, other)
    assert collection.compute()["kl"] > 0
    again = pickle.loads(pickle.dumps(collection["fidelity"]))
    assert again.compute()["kl"] == collection.compute()["kl"]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ((7, 40), (6, 40), "7 and 6 tokens"),
        ((7, 40), (7, 41), "cannot be compared"),
        ((0, 40), (0, 40), "0 and 0 tokens"),
        ((2, 7, 40), (3, 7, 40), "2 windows"),
    ],
)
def test_metric_refuses(one, other, message):
    with pytest.raises(ConfigError, match=message):
        FidelityMetric().update(logits(*one), logits(*other))


def test_metric_refuses_windows_of_two_lengths():
    metric = FidelityMetric()
    metric.update(logits(7, 40), logits(7, 40))
    with pytest.raises(ConfigError, match="6 tokens, the one before 7"):
        metric.update(logits(6, 40), logits(6, 40))


def rank_of_two(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    dense, other = logits(5, 7, 40), logits(5, 7, 40, seed=1)
    metric = FidelityMetric()
    for i in ([0, 1, 2], [3, 4])[rank]:
        metric.update(dense[i], other[i])
    found = metric.result()
    figures = [found.kl, found.kl_stderr, found.num_windows, found.num_tokens]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(figures))


def test_metric_over_two_uneven_processes(tmp_path):
    done = warm.run(f"{__name__}:{rank_of_two.__name__}", ranks=2, folder=str(tmp_path))
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    metric = FidelityMetric()
    metric.update(logits(5, 7, 40), logits(5, 7, 40, seed=1))
    one = metric.result()
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == pytest.approx(one.kl, rel=1e-13)
    assert ranks[0][1] == pytest.approx(one.kl_stderr, rel=1e-12)
    assert ranks[0][2:] == [5, 35]


def test_cache_serves_a_second_comparison(tmp_path):
    dense, model, windows = tiny(), perturbed("llama"), token_ids(4, 10)
    first = fidelity(cached_reference(tmp_path / "cache", dense, windows, top_k=61), model)
    exact = fidelity(DenseReference.collect(dense, windows), model)
    assert first.kl == pytest.approx(exact.kl, abs=1e-9)
    assert first.jaccard_15 == exact.jaccard_15
    assert (first.dense_top_k, exact.dense_top_k) == (61, None)
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat().st_mtime_ns
    dense.forward = None  # not run again
    again = fidelity(cached_reference(tmp_path / "cache", dense, windows, top_k=61), model)
    assert again == first
    assert file.stat().st_mtime_ns == before
    small = fidelity(collect_top_k(tiny(), windows, top_k=20), model)
    assert small.kl < exact.kl
    assert small.top1_agreement == exact.top1_agreement
    cached_reference(tmp_path / "cache", tiny(seed=1), windows, top_k=61)
    cached_reference(tmp_path / "cache", tiny(), token_ids(4, 10, seed=5), top_k=61)
    cached_reference(tmp_path / "cache", tiny(), windows, top_k=60)
    assert len(list((tmp_path / "cache").iterdir())) == 4  # each its own file


def test_cache_tells_how_tokens_are_cut_and_how_the_model_is_configured(tmp_path):
    ids = token_ids(4, 10)
    cached_reference(tmp_path, tiny(), ids)
    assert cached_reference(tmp_path, tiny(), ids.view(2, 20)).windows.window == 20  # the same tokens
    other = LlamaConfig(**GATED, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 20.0})
    moved = LlamaForCausalLM(other).double().eval()
    moved.load_state_dict(tiny().state_dict())
    assert fingerprint(moved) == fingerprint(tiny())  # not a weight differs
    reference = cached_reference(tmp_path, moved, ids, top_k=61)
    assert fidelity(reference, moved).kl == pytest.approx(0, abs=1e-12)
    assert fidelity(cached_reference(tmp_path, tiny(), ids, top_k=61), moved).kl > 1e-6


@pytest.mark.parametrize("cut", [{}, {"stride": 3}, {"count": 1}])
def test_the_dense_models_own_figures_come_from_the_cache(tmp_path, cut):
    windows = Windows.cut(token_ids(1, 40)[0].tolist(), window=10, **cut)
    model = tiny()
    cached_reference(tmp_path, model, windows, top_k=20)
    exact = measure(model, windows, reference=DenseReference.collect(model, windows), latency=False)
    found, same = cached_reference(tmp_path, model, windows, top_k=20).of_dense()
    assert found.value == pytest.approx(exact.perplexity.value, rel=1e-12)
    assert found.to_dict() | {"value": 0, "nll": 0} == exact.perplexity.to_dict() | {"value": 0, "nll": 0}
    assert same.to_dict() == exact.fidelity.to_dict() | {"dense_top_k": 20}


def test_a_cache_serves_a_model_on_another_device(monkeypatch):
    """The cache lies on the CPU; no accelerator is needed to see where it is compared."""
    seen = []

    def compared(p, q):
        seen.append({t.device.type for t in (p.logits, p.indices, p.lse, q)})
        return torch.zeros(len(q), len(QUANTITIES), dtype=torch.float64)

    monkeypatch.setattr("hfprune.evaluation.metrics.divergences", compared)
    FidelityMetric().update(TopLogits(TopK.of(logits(4, 61), 20), 61), torch.zeros(4, 61, device="meta"))
    assert seen == [{"meta"}]


def test_damaged_cache_is_refused(tmp_path):
    windows = token_ids(2, 10)
    cached_reference(tmp_path, tiny(), windows)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="Delete the file"):
        cached_reference(tmp_path, tiny(), windows)
    with pytest.raises(ConfigError, match="top_k=0 must be positive"):
        cached_reference(tmp_path, tiny(), windows, top_k=0)


def test_a_changed_bit_of_a_cache_is_refused_and_a_file_without_checksums_is_read(tmp_path):
    windows = token_ids(2, 10)
    first = cached_reference(tmp_path, tiny(), windows)
    (file,) = tmp_path.iterdir()
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    with pytest.raises(ConfigError, match="are corrupt. Delete the file"):
        cached_reference(tmp_path, tiny(), windows)
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    save_file(load_file(file), file)  # what earlier versions wrote
    again = cached_reference(tmp_path, tiny(), windows)
    assert torch.equal(again.top.logits, first.top.logits)
    assert torch.equal(again.nll, first.nll)
    assert again.vocab_size == first.vocab_size
