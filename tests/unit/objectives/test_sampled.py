"""Labels drawn from the model's own output: right in distribution, and the same however a sequence is run."""

import pytest
import torch

from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES, OutputHead, chunked_objective
from hfprune.objectives.sampled import Sampled, draw, position_numbers
from tests.helpers.models import tiny, token_ids
from tests.helpers.ragged import padded
from tests.reference import taylor as slow


def test_labels_are_those_of_python_integers_and_a_loop():
    model = tiny("llama")
    for seed in (0, 5):
        for ids in token_ids(3, 7, seed=seed):
            mask = torch.ones(1, 7, dtype=torch.int64)
            with torch.no_grad():
                p = torch.softmax(model(ids[None]).logits[0], -1)
            found = draw(p, position_numbers(ids[None], mask, seed)[0])
            assert found.tolist() == slow.drawn_labels(model, ids, seed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_sequence_draws_the_same_numbers_in_any_batch(side):
    rows = [token_ids(1, n, seed=n)[0] for n in (4, 9, 6)]
    batch = padded(rows, side)
    found = position_numbers(batch["input_ids"], batch["attention_mask"], 0)
    for row, ids in enumerate(rows):
        alone = position_numbers(ids[None], torch.ones(1, len(ids), dtype=torch.int64), 0)[0]
        assert torch.equal(found[row][batch["attention_mask"][row].bool()], alone)
    model = tiny("llama")
    whole, _ = objective_sum(model, OBJECTIVES.get("sampled"), batch)
    parts = sum(objective_sum(model, OBJECTIVES.get("sampled"), {"input_ids": ids[None]})[0] for ids in rows)
    assert float(whole.detach()) == pytest.approx(float(parts.detach()), rel=1e-5)


def test_numbers_differ_between_positions_sequences_and_seeds():
    ids = torch.tensor([[1, 5, 6], [1, 5, 7]])
    numbers = torch.cat([position_numbers(ids, torch.ones_like(ids), seed) for seed in (0, 1)])
    assert len(numbers.unique()) == numbers.numel()
    assert numbers.min() >= 0
    assert numbers.max() < 2**48


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    ids = torch.arange(3, 4003)[None] % 61
    labels = draw(p.expand(4000, -1), position_numbers(ids, torch.ones_like(ids), 0)[0])
    share = torch.bincount(labels, minlength=4) / 4000
    torch.testing.assert_close(share.double(), p, atol=0.03, rtol=0)  # four standard deviations
    assert share[1] == 0


def test_chunks_draw_the_same_labels_and_gradients_are_those_of_cross_entropy():
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    head = OutputHead(weight=torch.randn(11, 4, dtype=torch.float64))
    numbers = position_numbers(token_ids(1, 9, vocab=11), torch.ones(1, 9, dtype=torch.int64), 0)[0]
    totals = [chunked_objective(Sampled(), hidden, head, numbers, chunk_bytes=size) for size in (1, 200, 2**20)]
    values = [float(total.detach()) for total in totals]
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)
    log_p = torch.log_softmax(hidden @ head.weight.T, -1)
    labels = draw(log_p.detach().exp(), numbers)
    expected = -log_p.gather(1, labels[:, None]).sum()
    assert values[0] == pytest.approx(float(expected.detach()), rel=1e-12)
    (found,), (reference,) = (torch.autograd.grad(t, hidden) for t in (totals[0], expected))
    torch.testing.assert_close(found, reference, atol=1e-12, rtol=0)
