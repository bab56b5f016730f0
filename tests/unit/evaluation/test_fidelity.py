import json
import math
import statistics

import pytest
import torch

from hfprune.evaluation import DenseReference, Windows, fidelity, window_hidden
from hfprune.evaluation.fidelity import fidelity_of
from hfprune.objectives import OutputHead
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids


def perturbed(name):
    """The tiny model with other MLP weights, as if pruned: its output head is unchanged."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".mlp." in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def loop_reference(dense, model, windows):
    """KL per window and agreement, one token and one vocabulary entry at a time, in float64."""
    with torch.no_grad():
        p = torch.log_softmax(dense(input_ids=windows).logits.double(), -1)
        q = torch.log_softmax(model(input_ids=windows).logits.double(), -1)
    kls, same = [], 0
    for row_p, row_q in zip(p, q, strict=True):
        total = 0.0
        for token_p, token_q in zip(row_p.tolist(), row_q.tolist(), strict=True):
            total += math.fsum(math.exp(a) * (a - b) for a, b in zip(token_p, token_q, strict=True))
            same += token_p.index(max(token_p)) == token_q.index(max(token_q))
        kls.append(total / len(row_p))
    return kls, same / windows.numel()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equals_a_loop_over_whole_logits(name):
    dense, model, windows = tiny(name), perturbed(name), token_ids(4, 10)
    found = fidelity(DenseReference.collect(dense, windows), model)
    kls, agreement = loop_reference(dense, model, windows)
    assert statistics.fmean(kls) > 1e-3
    assert 0 < agreement < 1
    assert found.kl == pytest.approx(statistics.fmean(kls), abs=1e-9)
    assert found.kl_stderr == pytest.approx(statistics.stdev(kls) / 2, abs=1e-9)
    assert found.top1_agreement == agreement
    assert found.num_tokens == 40
    assert json.loads(json.dumps(found.to_dict()))["kl"] == found.kl


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_float32_agrees_with_float64(name):
    windows = token_ids(4, 10)
    wide = fidelity(DenseReference.collect(tiny(name), windows), perturbed(name))
    narrow = fidelity(DenseReference.collect(tiny(name).float(), windows), perturbed(name).float())
    assert narrow.kl == pytest.approx(wide.kl, rel=1e-4)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 61 * 3, 4 * 61 * 10])
def test_does_not_depend_on_the_chunk_size(chunk_bytes):
    model, windows = perturbed("llama"), token_ids(2, 10)
    reference = DenseReference.collect(tiny(), windows)
    hidden, head = window_hidden(model, windows), OutputHead.of(model.lm_head)
    whole, chunked = (fidelity_of(reference, hidden, head, **k) for k in ({}, {"chunk_bytes": chunk_bytes}))
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-12)
    assert chunked.top1_agreement == whole.top1_agreement


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_is_faithful_to_itself(name, dtype):
    model, windows = tiny(name, dtype=dtype), token_ids(3, 10)
    found = fidelity(DenseReference.collect(model, windows), model)
    assert (found.kl, found.kl_stderr, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_does_not_depend_on_the_batch_size():
    windows = token_ids(5, 10)
    reference = DenseReference.collect(tiny(), windows)
    batched = DenseReference.collect(tiny(), windows, batch_size=3)
    expected = fidelity(reference, perturbed("llama")).kl
    assert fidelity(batched, perturbed("llama"), batch_size=2).kl == pytest.approx(expected, rel=1e-12)


def test_a_copied_head_survives_training_and_a_shared_one_does_not():
    model, windows = tiny("llama_untied_bias"), token_ids()
    copied, shared = (DenseReference.collect(model, windows, copy_head=copy) for copy in (True, False))
    assert shared.head.weight is model.lm_head.weight
    assert not copied.head.weight.requires_grad
    before = copied.head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    torch.testing.assert_close(copied.head.weight, before, rtol=0, atol=0)
    assert fidelity(copied, model).kl > 1e-3
    assert fidelity(shared, model).kl == 0  # why copying is the default: a shared head moves along


def test_holds_hidden_states_not_logits():
    reference = DenseReference.collect(tiny(), token_ids(2, 10))
    assert reference.hidden.shape == (2, 10, 16)
    assert not reference.hidden.requires_grad


def masked(head, columns):
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype)
    bias[columns] = -math.inf
    return OutputHead(weight=head.weight, bias=bias)


def test_masked_vocabulary():
    generator = torch.Generator().manual_seed(1)
    full = OutputHead(weight=torch.randn(9, 4, generator=generator, dtype=torch.float64))
    hidden, other = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    windows = torch.zeros(3, 5, dtype=torch.int64)
    both = fidelity_of(
        DenseReference(windows=Windows.of(windows), hidden=hidden, head=masked(full, [7, 8])),
        other,
        masked(full, [7, 8]),
    )
    cut = OutputHead(weight=full.weight[:7])
    assert both.kl == pytest.approx(
        fidelity_of(DenseReference(windows=Windows.of(windows), hidden=hidden, head=cut), other, cut).kl
    )
    dense_only = fidelity_of(
        DenseReference(windows=Windows.of(windows), hidden=hidden, head=masked(full, [7])), other, full
    )
    assert 0 < dense_only.kl < math.inf
    pruned_only = fidelity_of(
        DenseReference(windows=Windows.of(windows), hidden=hidden, head=full), other, masked(full, [7])
    )
    assert (pruned_only.kl, pruned_only.kl_stderr) == (math.inf, None)


@pytest.mark.parametrize("broken", ["dense", "model"])
def test_nan_is_not_hidden(broken):
    head, good = OutputHead(weight=torch.randn(9, 4)), torch.randn(2, 5, 4)
    bad = torch.full_like(good, math.nan)
    dense, other = (bad, good) if broken == "dense" else (good, bad)
    reference = DenseReference(windows=Windows.of(torch.zeros(2, 5, dtype=torch.int64)), hidden=dense, head=head)
    assert math.isnan(fidelity_of(reference, other, head).kl)


def test_a_single_window_has_no_standard_error():
    windows = token_ids(1, 10)
    assert fidelity(DenseReference.collect(tiny(), windows), perturbed("llama")).kl_stderr is None


def test_other_vocabulary_is_an_error_that_names_both_sizes():
    model, windows = tiny(), token_ids()
    reference = DenseReference.collect(model, windows)
    model.resize_token_embeddings(70)
    with pytest.raises(ConfigError, match=r"61 tokens.* 70"):
        fidelity(reference, model)


def test_no_windows_is_an_error():
    head, nothing = OutputHead(weight=torch.randn(9, 4)), torch.zeros(0, 5, 4)
    reference = DenseReference(windows=Windows.of(torch.zeros(0, 5, dtype=torch.int64)), hidden=nothing, head=head)
    with pytest.raises(ConfigError, match="no tokens"):
        fidelity_of(reference, nothing, head)
