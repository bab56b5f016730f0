"""Conversations: greedy answers are those of generate, turns are kept, sampling follows the seed."""

import pytest
import torch

from hfprune.publishing.conversation import Conversation
from hfprune.utils.errors import ConfigError
from tests.helpers.models import styled_tokenizer, tiny, tiny_tokenizer


def talk(tokenizer=None, **settings):
    tokenizer = tokenizer or tiny_tokenizer()
    return Conversation(model=tiny(vocab=max(61, len(tokenizer))), tokenizer=tokenizer, **settings)


def test_an_answer_is_the_greedy_continuation():
    found = talk(max_new_tokens=6)
    ids = found.tokenizer("assert x", return_tensors="pt").input_ids
    out = found.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    expected = found.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert found.reply("assert x") == expected
    assert found.reply("assert x") == expected  # no template: nothing is kept
    assert found.turns == []


def test_turns_are_kept_with_a_chat_template():
    found = talk(styled_tokenizer("llama3"), max_new_tokens=2, system="Be brief.")
    found.model.config.max_position_embeddings = 512
    found.reply("one")
    found.reply("two")
    assert [turn["role"] for turn in found.turns] == ["system", "user", "assistant", "user", "assistant"]


def test_sampling_follows_the_seed_and_leaves_the_generator_alone():
    answers = [talk(temperature=5.0, seed=seed, max_new_tokens=12).reply("assert") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    found, before = talk(temperature=5.0), torch.random.get_rng_state()
    found.reply("assert")
    assert torch.equal(before, torch.random.get_rng_state())


def test_settings_and_prompts_that_cannot_be_used():
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        talk(max_new_tokens=0)
    with pytest.raises(ConfigError, match="temperature=-1"):
        talk(temperature=-1)
    with pytest.raises(ConfigError, match="chat template"):
        talk(system="x")
    with pytest.raises(ConfigError, match="at most 64"):
        talk().reply("assert " * 80)
    with pytest.raises(ConfigError, match="0 tokens"):
        talk().reply("")
    with pytest.raises(ConfigError, match="System role not supported"):
        talk(styled_tokenizer("gemma"), system="x").reply("y")
