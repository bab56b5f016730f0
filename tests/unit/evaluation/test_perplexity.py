import json
import math

import pytest
import torch
import torch.nn.functional as F

from hfprune.evaluation import Windows, perplexity
from hfprune.evaluation.perplexity import perplexity_of
from hfprune.objectives import OutputHead
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, token_ids


def direct_nll(model, windows):
    """Mean next-token cross-entropy from whole logits."""
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["llama", "llama_untied_bias", "gemma2", "opt_350m_style", "gpt2"])
def test_equals_whole_logits(name, dtype, tolerance):
    model, windows = tiny(name, dtype=dtype), token_ids(3, 12)
    found = perplexity(model, windows)
    expected = direct_nll(model, windows)
    assert found.nll == pytest.approx(expected, rel=tolerance)
    assert found.value == pytest.approx(math.exp(expected), rel=tolerance)


def test_the_soft_cap_matters_in_this_test_model():
    """Otherwise the Gemma 2 case above would not cover it."""
    model, windows = tiny("gemma2"), token_ids(3, 12)
    capped = direct_nll(model, windows)
    model.config.final_logit_softcapping = None
    assert abs(direct_nll(model, windows) - capped) > 1e-3


def test_does_not_depend_on_the_batch_size():
    model, windows = tiny(), token_ids(5, 9)
    assert perplexity(model, windows, batch_size=4).nll == pytest.approx(perplexity(model, windows).nll, rel=1e-12)


def test_uses_eval_mode_and_restores_every_flag():
    model, windows = tiny("gpt2"), token_ids()  # dropout 0.1 by default
    expected = perplexity(model, windows).nll
    model.train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    assert perplexity(model, windows).nll == expected
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_says_what_was_measured():
    found = perplexity(tiny(), token_ids(3, 12))
    assert (found.num_windows, found.window, found.num_tokens) == (3, 12, 33)
    report = json.loads(json.dumps(found.to_dict()))
    expected = "all 3 non-overlapping windows of 12 tokens, no BOS added, mean over 33 predicted tokens"
    assert report["protocol"] == expected
    assert report["value"] == found.value


@pytest.mark.parametrize(
    ("scale", "check"), [(1e4, lambda v: v == math.inf), (math.nan, math.isnan)], ids=["overflow", "nan"]
)
def test_a_broken_model_is_reported_as_it_is(scale, check):
    head = OutputHead(weight=torch.eye(4))
    hidden = scale * torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, 3, 4)
    assert check(perplexity_of(hidden, head, torch.zeros(1, 3, dtype=torch.int64)).value)


@pytest.mark.parametrize("shape", [(2, 1), (0, 5)])
def test_nothing_to_predict_is_an_error(shape):
    with pytest.raises(ConfigError, match="got shape"):
        perplexity(tiny(), torch.zeros(shape, dtype=torch.int64))


def independent_perplexity(model, stream, window, stride):
    """Fifteen lines that share nothing with the product: every token once, with the context its window gives it."""
    total, count, done = 0.0, 0, 1
    for start in range(0, len(stream) - window + 1, stride):
        ids = torch.tensor([stream[start : start + window]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].double().log_softmax(-1)
        for position in range(1, window):
            if start + position >= done:
                total -= float(log_probs[position - 1, stream[start + position]])
                count += 1
        done = start + window
    return math.exp(total / count), count


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_equals_an_independent_computation(stride):
    model, stream = tiny(), token_ids(1, 70)[0].tolist()
    windows = Windows.cut(stream, window=16, stride=stride)
    found = perplexity(model, windows)
    value, count = independent_perplexity(model, stream, 16, stride)
    assert found.value == pytest.approx(value, abs=1e-5)
    assert found.num_tokens == count
