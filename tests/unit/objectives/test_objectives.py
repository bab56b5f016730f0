"""Closed forms against loops, finite differences and autograd (acceptance test 1 of the methods note)."""

import math

import pytest
import torch

from hfprune.objectives import OBJECTIVES, OutputHead, Term, chunked_objective, chunked_objectives
from hfprune.objectives.chunked import CHUNK_BYTES, chunk_tokens
from hfprune.objectives.cross_entropy import cross_entropy
from hfprune.objectives.entropy import entropy
from hfprune.utils.errors import ConfigError
from tests.reference import objectives as slow


def random_logits(tokens=5, vocab=7, scale=3.0):
    return scale * torch.randn(tokens, vocab, dtype=torch.float64)


def test_entropy_equals_the_loop_reference():
    z = random_logits()
    found = entropy(z.clone())
    for t, row in enumerate(z.tolist()):
        assert found.value[t] == pytest.approx(slow.entropy(row), abs=1e-12)
        torch.testing.assert_close(found.grad[t].tolist(), slow.entropy_grad(row), atol=1e-12, rtol=0)
        torch.testing.assert_close(found.grad[t].tolist(), slow.finite_difference(slow.entropy, row), atol=1e-7, rtol=0)


def test_cross_entropy_equals_the_loop_reference():
    z, y = random_logits(), torch.tensor([0, 6, 3, 3, 1])
    found = cross_entropy(z.clone(), y)
    for t, row in enumerate(z.tolist()):
        label = int(y[t])
        assert found.value[t] == pytest.approx(slow.cross_entropy(row, label), abs=1e-12)
        torch.testing.assert_close(found.grad[t].tolist(), slow.cross_entropy_grad(row, label), atol=1e-12, rtol=0)


def test_entropy_gradient_equals_autograd():
    z = random_logits(64, 33).requires_grad_()
    log_p = torch.log_softmax(z, -1)
    (expected,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), z)
    torch.testing.assert_close(entropy(z.detach().clone()).grad, expected, atol=1e-12, rtol=0)


def test_entropy_of_underflowing_probabilities_is_finite():
    z = torch.tensor([[0.0, -2000.0, 1.0, -1e30], [800.0, -800.0, 0.0, 0.0]], dtype=torch.float64)
    found = entropy(z.clone())
    assert found.grad.isfinite().all()
    for t, row in enumerate(z.tolist()):
        assert found.value[t] == pytest.approx(slow.entropy(row), abs=1e-12)
    assert found.value[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_vocabulary_has_no_share(dtype):
    z = random_logits().to(dtype)
    wide = torch.cat([z, torch.full((5, 2), -torch.inf, dtype=dtype)], dim=1)
    narrow, masked = entropy(z.clone()), entropy(wide.clone())
    torch.testing.assert_close(masked.value, narrow.value)
    torch.testing.assert_close(masked.grad[:, :7], narrow.grad)
    assert (masked.grad[:, 7:] == 0).all()
    y = torch.tensor([0, 1, 2, 3, 4])
    torch.testing.assert_close(cross_entropy(wide.clone(), y).grad[:, :7], cross_entropy(z.clone(), y).grad)


@pytest.mark.parametrize("nothing", ["uniform", "certain"])
def test_entropy_gradient_vanishes(nothing):
    z = torch.zeros(1, 5) if nothing == "uniform" else torch.tensor([[200.0, 0, 0, 0, 0]])
    assert entropy(z).grad.abs().max() < 1e-7


def head(vocab=11, hidden=6, *, bias=True, softcap=None, scale=1.0, dtype=torch.float64):
    return OutputHead(
        weight=torch.randn(vocab, hidden, dtype=dtype, requires_grad=True),
        bias=torch.randn(vocab, dtype=dtype, requires_grad=True) if bias else None,
        softcap=softcap,
        scale=scale,
    )


def plain_sum(name, hidden, h, targets):
    """The objective through whole logits and autograd."""
    z = (hidden @ h.weight.T + (0 if h.bias is None else h.bias)) * h.scale
    z = z if h.softcap is None else h.softcap * torch.tanh(z / h.softcap)
    log_p = torch.log_softmax(z, -1)
    return -(log_p.exp() * log_p).sum() if name == "entropy" else -log_p.gather(1, targets[:, None]).sum()


@pytest.mark.parametrize("name", ["entropy", "cross_entropy"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_chunked_equals_whole(name, softcap, scale, bias, rows_per_chunk):
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    h = head(softcap=softcap, scale=scale, bias=bias)
    objective = OBJECTIVES.get(name)
    leaves = [hidden, h.weight] + ([h.bias] if bias else [])
    expected = plain_sum(name, hidden, h, targets)
    expected_grads = torch.autograd.grad(2 * expected, leaves)
    found = chunked_objective(objective, hidden, h, targets, chunk_bytes=rows_per_chunk * 4 * 11)
    found_grads = torch.autograd.grad(2 * found, leaves)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    for f, e in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(f, e, atol=1e-11, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_several_objectives_over_their_own_tokens(softcap, rows_per_chunk):
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    tokens = torch.tensor([True, False, True, True, False, True, True, False, True])
    h = head(softcap=softcap)
    terms = [Term(OBJECTIVES.get("entropy")), Term(OBJECTIVES.get("cross_entropy"), targets, tokens)]
    leaves = [hidden, h.weight, h.bias]
    expected = [plain_sum("entropy", hidden, h, None), plain_sum("cross_entropy", hidden[tokens], h, targets[tokens])]
    found = chunked_objectives(terms, hidden, h, chunk_bytes=rows_per_chunk * 4 * 11)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=0)
        wanted = torch.autograd.grad(other, leaves, retain_graph=True)
        for f, e in zip(torch.autograd.grad(mine, leaves, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(f, e, atol=1e-11, rtol=0)
    both = torch.autograd.grad(found[0] - 2 * found[1], leaves)
    for f, e in zip(both, torch.autograd.grad(expected[0] - 2 * expected[1], leaves), strict=True):
        torch.testing.assert_close(f, e, atol=1e-11, rtol=0)


def test_arithmetic_on_logits_is_float32_for_a_bfloat16_model():
    hidden = torch.randn(64, 16, dtype=torch.bfloat16)
    h = OutputHead(weight=torch.randn(500, 16, dtype=torch.bfloat16))
    z = (hidden @ h.weight.T).double()
    expected = sum(slow.entropy(row) for row in z.tolist())
    assert float(chunked_objective(OBJECTIVES.get("entropy"), hidden, h)) == pytest.approx(expected, rel=1e-6)
    log_p = torch.log_softmax((hidden @ h.weight.T), -1)  # what bfloat16 arithmetic would give
    coarse = float(-(log_p.exp() * log_p).sum())
    assert abs(coarse - expected) / expected > 1e-5


def test_chunks_are_bounded_in_bytes_whatever_the_vocabulary():
    for vocab in (8_000, 49_152, 256_000):
        assert chunk_tokens(vocab) * vocab * 4 <= CHUNK_BYTES
    assert chunk_tokens(10**9) == 1


def test_no_gradient_is_computed_when_none_is_needed():
    hidden, h = torch.randn(4, 6), head(dtype=torch.float32)
    with torch.no_grad():
        value = chunked_objective(OBJECTIVES.get("entropy"), hidden, h)
    assert not value.requires_grad


def test_targets_of_padded_sequences():
    ids = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    targets, valid = OBJECTIVES.get("cross_entropy").targets(ids, mask, None)
    assert valid.tolist() == [[True, True, False, False], [False, True, True, False]]
    assert targets[valid].tolist() == [6, 7, 9, 4]
    none, valid = OBJECTIVES.get("entropy").targets(ids, mask, None)
    assert none is None
    assert valid.tolist() == mask.bool().tolist()


def test_labels_restrict_cross_entropy_but_not_entropy():
    ids = torch.tensor([[5, 6, 7, 8]])
    mask, labels = torch.ones_like(ids), torch.tensor([[-100, -100, 7, 8]])
    _, valid = OBJECTIVES.get("cross_entropy").targets(ids, mask, labels)
    assert valid.tolist() == [[False, True, True, False]]
    assert OBJECTIVES.get("entropy").targets(ids, mask, labels)[1].all()


def test_unknown_objective_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'entropy'\? Known: cross_entropy, entropy"):
        OBJECTIVES.get("entopy")


def test_uniform_distribution_has_log_v_nats():
    assert float(entropy(torch.zeros(1, 50)).value) == pytest.approx(math.log(50))
