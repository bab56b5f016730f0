import json
import math

import pytest
import torch

from hfprune.evaluation import measure_latency
from hfprune.evaluation.size_and_speed import compare_latency
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_figures_are_sane(name):
    found = measure_latency(tiny(name, dtype=torch.float32), prompt_tokens=8, new_tokens=4, repeats=3)
    assert 0 < found.prefill_spread_ms[0] <= found.prefill_ms <= found.prefill_spread_ms[1] < math.inf
    assert 0 < found.decode_spread_ms[0] <= found.decode_ms <= found.decode_spread_ms[1] < math.inf
    assert found.decode_tokens_per_s == pytest.approx(1000 / found.decode_ms)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    assert (found.prompt_tokens, found.new_tokens, found.repeats) == (8, 4, 3)
    assert json.loads(json.dumps(found.to_dict()))["decode_tokens_per_s"] == found.decode_tokens_per_s


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # max_position_embeddings and n_positions, 64 both
def test_lengths_fit_the_positions(name):
    found = measure_latency(tiny(name), prompt_tokens=500, new_tokens=4, repeats=1, warmup=0)
    assert (found.prompt_tokens, found.new_tokens) == (60, 4)
    found = measure_latency(tiny(name), prompt_tokens=500, new_tokens=500, repeats=1, warmup=0)
    assert found.prompt_tokens + found.new_tokens == 64


def test_each_repeat_is_one_prefill_and_one_call_per_token():
    model, calls = tiny(), []
    forward = model.forward

    def spy(*args, **kwargs):
        calls.append((kwargs["input_ids"].shape[1], kwargs.get("logits_to_keep"), torch.is_grad_enabled()))
        return forward(*args, **kwargs)

    model.forward = spy
    measure_latency(model, prompt_tokens=8, new_tokens=3, repeats=2, warmup=1)
    assert calls[:12] == ([(8, 1, False)] + [(1, None, False)] * 3) * 3
    assert calls[12:] == [(8, 1, False)] + [(1, None, False)] * 2  # not timed: the memory


def test_models_take_turns_and_ratios_are_those_of_a_turn(monkeypatch):
    order = []
    seconds = {
        "dense": iter([9, 9, 2.0, 1.0, 4.0, 1.0, 2.0, 1.0, 0, 0]),
        "small": iter([9, 9, 1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 0, 0]),
    }
    dense, small = tiny(), tiny()
    names = {id(dense): "dense", id(small): "small"}

    def timed(model, ids, new_tokens):
        name = names[id(model)]
        order.append(name)
        return next(seconds[name]), next(seconds[name])

    monkeypatch.setattr("hfprune.evaluation.size_and_speed._measure_once", timed)
    first, second = compare_latency([dense, small], prompt_tokens=4, new_tokens=2, repeats=3)
    assert order[:8] == ["dense", "small"] * 4
    assert (first.prefill_ratio, first.decode_ratio) == (None, None)
    assert (second.prefill_ratio, second.prefill_ratio_spread) == (0.5, (0.25, 0.5))
    assert (second.decode_ratio, second.decode_ratio_spread) == (0.5, (0.25, 1.0))
    assert (first.prefill_ms, first.prefill_spread_ms, second.decode_ms) == (2.0, (2.0, 4.0), 0.5)


def test_restores_every_training_flag():
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    measure_latency(model, prompt_tokens=4, new_tokens=2, repeats=1)
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"prompt_tokens": 0}, {"new_tokens": 0}, {"warmup": -1}])
def test_nothing_to_time_is_an_error(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        measure_latency(tiny(), **bad)
