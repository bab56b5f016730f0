import torch

from hfprune.evaluation.size_and_speed import peak_bytes
from tests.helpers.models import tiny

WEIGHTS = 4 * sum(p.numel() for p in tiny(dtype=torch.float32).parameters())


def test_counts_what_lives_at_once():
    model = tiny(dtype=torch.float32)

    def run():
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2  # a is gone: b and c
        view = c[:10]  # no memory of its own
        del b, c
        return torch.zeros(1500) + view.sum()  # c lives on through its view: c, the sum, two of 1500

    assert peak_bytes(model, run) == WEIGHTS + 4 * (1000 + 1500 + 1500 + 1)


def test_what_is_freed_does_not_count():
    model = tiny(dtype=torch.float32)

    def run():
        for _ in range(5):
            torch.ones(100)

    assert peak_bytes(model, run) == WEIGHTS + 400


def test_weights_count_once_and_only_once():
    model = tiny(dtype=torch.float32)
    assert peak_bytes(model, lambda: model.lm_head.weight.view(-1)[:5]) == WEIGHTS
