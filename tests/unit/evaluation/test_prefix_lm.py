import random

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.models.huggingface import HFLM

from hfprune.evaluation.prefix_lm import PrefixLM, Row, share_prefixes
from hfprune.models import output_head
from hfprune.utils.errors import ConfigError
from tests.helpers.models import NAMES, tiny, tiny_tokenizer


def requests(seed=0):
    """Multiple choice with shared contexts, contexts that differ by a token, one-token answers, and none to share."""
    generator = random.Random(seed)

    def ids(count):
        return [generator.randrange(3, 61) for _ in range(count)]

    found = []
    for length in (20, 3, 9):
        context = ids(length)
        found += [(context, ids(n)) for n in (1, 4, 2, 7)]
    shared, ending = ids(12), ids(5)
    found += [(shared + ids(1), ending) for _ in range(2)]
    found += [([1], ids(6)) for _ in range(2)]
    found += [(ids(30), [5]), (ids(60), ids(20))]  # the last is longer than the 64 positions
    few_shot = ids(25)
    found += [(few_shot + ids(4), ids(3)) for _ in range(7)]
    return [(None, context, rest) for context, rest in found]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_harness(name):
    model = tiny(name)
    asked = requests()
    stock = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=1, max_length=64)
    ours = PrefixLM(model, tiny_tokenizer(), batch_size=3)
    expected = stock._loglikelihood_tokens(asked, disable_tqdm=True)
    found = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found], dtype=torch.float64),
        torch.tensor([value for value, _ in expected], dtype=torch.float64),
        rtol=0,
        atol=1e-5,  # gemma 2 computes its soft cap in float32
    )


def test_says_what_greedy_decoding_would_give():
    model = tiny()
    context = [5, 6, 7]
    ids = torch.tensor([context])
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    greedy = ids[0, 3:].tolist()
    other = [*greedy[:2], (greedy[2] + 1) % 61]
    found = PrefixLM(model, tiny_tokenizer())._loglikelihood_tokens([(None, context, greedy), (None, context, other)])
    assert [answer for _, answer in found] == [True, False]


def test_an_answer_longer_than_the_positions_is_refused():
    lm = PrefixLM(tiny(), tiny_tokenizer())
    with pytest.raises(ConfigError, match="answer of 65 tokens exceeds the model.s maximum of 64"):
        lm._loglikelihood_tokens([(None, [5], [6] * 65)], disable_tqdm=True)


def test_runs_a_shared_context_once():
    model, lengths = tiny(), []
    output_head(model)  # compared with the model's own logits once, by a pass of four tokens
    forward = model.model.forward

    def spy(*args, **kwargs):
        lengths.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    model.model.forward = spy
    context = list(range(3, 33))
    asked = [(None, context, [n, n + 1]) for n in range(40, 44)]
    PrefixLM(model, tiny_tokenizer(), batch_size=3)._loglikelihood_tokens(asked)
    assert lengths == [(1, 29), (3, 2), (1, 2)]


def test_groups():
    def row(text, targets=1):
        return Row(list(text.encode()), targets)

    rows = [row("abcdefgh"), row("abcdefgi"), row("abcdxxxy"), row("zzz")]
    assert list(share_prefixes(rows)) == [(4, [0, 1, 2]), (1, [3])]
    tokens = sum(shared + sum(len(rows[n].ids) - 1 - shared for n in group) for shared, group in share_prefixes(rows))
    assert tokens <= sum(len(r.ids) - 1 for r in rows)
    assert list(share_prefixes([])) == []
    assert [group for _, group in share_prefixes([row("ab"), row("cb")])] == [[0], [1]]  # nothing in common
    assert list(share_prefixes([row("abcdef", 3), row("abcdxx", 3)])) == [(2, [0, 1])]  # targets are never shared


def test_keeps_the_order_and_the_training_flags():
    model = tiny("gpt2")
    lm = PrefixLM(model, tiny_tokenizer())
    asked = requests()
    forward = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    backward = lm._loglikelihood_tokens(asked[::-1], disable_tqdm=True)[::-1]
    for (a, _), (b, _) in zip(forward, backward, strict=True):
        assert a == pytest.approx(b, abs=1e-9)
