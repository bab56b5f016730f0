import pytest
import torch

from hfprune.evaluation import DenseReference, Windows, fidelity
from hfprune.evaluation.fidelity import fidelity_of
from hfprune.models.forward import window_hidden
from hfprune.objectives import OutputHead
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids
from tests.unit.evaluation.test_fidelity import perturbed

STREAM = list(range(100, 121))


def test_windows_that_do_not_overlap():
    windows = Windows.cut(STREAM, window=5)
    assert windows.ids.tolist() == [STREAM[i : i + 5] for i in (0, 5, 10, 15)]
    assert [windows.first_target(i) for i in range(4)] == [1] * 4
    assert windows.num_targets == 16
    assert windows.compared == slice(None)
    assert windows.protocol == (
        "all 4 non-overlapping windows of 5 tokens, no BOS added, mean over 16 predicted tokens"
    )
    some = Windows.cut(STREAM, window=5, count=2, source="wiki.txt")
    assert torch.equal(some.ids, windows.ids[:2])
    assert some.protocol.startswith("wiki.txt: first 2 non-overlapping")


def test_overlapping_windows_score_every_token_once():
    windows = Windows.cut(STREAM, window=6, stride=2)
    assert windows.ids.tolist() == [STREAM[i : i + 6] for i in range(0, 15, 2)]
    scored = [t for i, row in enumerate(windows.ids.tolist()) for t in row[windows.first_target(i) :]]
    assert scored == STREAM[1:20]
    assert windows.num_targets == len(scored)
    assert "overlapping windows of 6 tokens, stride 2" in windows.protocol


def test_bos_is_counted_in_the_window_and_not_in_the_text():
    windows = Windows.cut(STREAM, window=5, bos_id=1)
    assert windows.ids.tolist() == [[1, *STREAM[i : i + 4]] for i in range(0, 20, 4)]
    assert windows.num_targets == 20
    assert not windows.overlap
    assert "each begins with BOS" in windows.protocol
    strided = Windows.cut(STREAM, window=5, stride=3, bos_id=1)
    scored = [t for i, row in enumerate(strided.ids.tolist()) for t in row[strided.first_target(i) :]]
    assert scored == STREAM[: len(scored)]


def test_a_text_shorter_than_a_window_gives_none():
    assert Windows.cut(STREAM, window=22).ids.shape == (0, 22)


def test_fidelity_of_overlapping_windows_compares_each_prediction_once():
    stream = token_ids(1, 40)[0].tolist()
    windows = Windows.cut(stream, window=10, stride=3)
    dense, model = tiny(), perturbed("llama")
    found = fidelity(DenseReference.collect(dense, windows), model)
    assert found.num_tokens == 3 * len(windows.ids)
    assert len(found.kl_by_position) == 3
    hidden = [window_hidden(m, windows.ids)[:, -3:] for m in (dense, model)]
    plain = DenseReference(windows=Windows.of(windows.ids[:, -3:]), hidden=hidden[0], head=OutputHead.of(dense.lm_head))
    assert found.kl == fidelity_of(plain, hidden[1], OutputHead.of(model.lm_head)).kl


def test_ids_must_be_windows():
    with pytest.raises(ConfigError, match=r"\[N, W\]"):
        Windows.of(torch.zeros(5, dtype=torch.int64))
    windows = Windows.of(token_ids(2, 10))
    assert Windows.of(windows) is windows
