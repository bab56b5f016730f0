"""Layouts, templates, the loss on responses alone, long examples, packing and the cache of tokenised examples."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hfprune.data import ChatRow, InstructionRow, Turn, load_rows
from hfprune.data.chat_template import ChatEncoder
from hfprune.data.encode import tokenizer_key
from hfprune.data.examples import Encoder, ExampleOptions, pack
from hfprune.models.forward import objective_sum
from hfprune.objectives import OBJECTIVES
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, tiny_tokenizer, token_ids
from tests.unit.data.test_text import bound

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


CHAT = [
    {"from": "system", "value": "be"},
    {"from": "human", "value": "the while"},
    {"from": "gpt", "value": "is a statement"},
    {"from": "human", "value": "and"},
    {"from": "gpt", "value": "so is the assert"},
    {"from": "human", "value": "never answered"},
]


def test_sharegpt_and_messages_are_one_layout(tmp_path):
    messages = [{"role": {"human": "user", "gpt": "assistant"}.get(t["from"], t["from"]), "content": t["value"]}
                for t in CHAT]  # fmt: skip
    found = [load_rows(write(tmp_path / f"{i}.json", [row])) for i, row in
             enumerate(({"conversations": CHAT}, {"messages": messages, "source": "x"}))]  # fmt: skip
    assert found[0].kind == "chat"
    assert found[0].chats == found[1].chats
    assert [turn.speaker for turn in found[0].chats[0].turns] == ["system", "user", "assistant", "user", "assistant"]


def test_chat_rows_that_teach_nothing_are_counted(tmp_path):
    bad = [
        [{"from": "human", "value": "x"}],
        [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}],
        [{"from": "narrator", "value": "x"}],
        [{"from": "gpt", "value": 3}],
        [],
        "text",
    ]
    rows = load_rows(write(tmp_path / "a.json", [{"conversations": turns} for turns in [*bad, CHAT]]))
    assert len(rows.chats) == 1
    assert rows.dropped == {"no response": 2, "unknown speaker": 1, "not text": 2, "empty": 1}
    with pytest.raises(ConfigError, match="holds no conversation with a response"):
        load_rows(write(tmp_path / "b.json", [{"messages": bad[0]}]))


def test_lamini_is_alpaca_by_another_name(tmp_path):
    rows = load_rows(write(tmp_path / "a.json", [{"instruction": "Add.", "response": "3", "instruction_source": "x"}]))
    assert rows.instructions == (InstructionRow(instruction="Add.", input="", output="3"),)


def supervised(tokenizer, labels):
    return "".join(tokenizer.decode([label for label in labels if label != -100]).split())


def test_chat_loss_is_on_responses_up_to_eos(tokenizer):
    row = ChatRow((Turn("user", "the while"), Turn("assistant", "is a"), Turn("user", "and"), Turn("assistant", "the")))
    ((ids, labels),) = ChatEncoder(tokenizer)(row)
    ends = [i for i, label in enumerate(labels) if label == tokenizer.eos_token_id]
    assert len(ends) == 2
    assert supervised(tokenizer, labels) == "isa</s>the</s>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert labels[0] == -100


def test_a_template_without_eos_gets_one(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("</s>", "")
    ((ids, labels),) = ChatEncoder(tokenizer)(ChatRow((Turn("user", "the"), Turn("assistant", "is"))))
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id


def test_templates_that_rewrite_are_trained_by_turns_and_refusals_are_said(tokenizer, tmp_path):
    row = {"messages": [{"role": r, "content": "the"} for r in ("user", "assistant", "user", "assistant")]}
    tokenizer.chat_template = "{{ messages|selectattr('role', 'equalto', 'user')|list|length }} " + TEMPLATE
    source = write(tmp_path / "a.json", [row, {"messages": row["messages"][:2]}])
    data = bound(tokenizer, recovery=source, validation="builtin", seq_len=64)
    with pytest.warns(UserWarning, match="1 .earlier turns rewritten by the chat template: trained turn by turn.[.]$"):
        assert len(data.train_dataloader().dataset) == 3
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ConfigError, match=r"no example can be used .2 refused by the chat template: no.[.]$"):
        bound(tokenizer, recovery=write(tmp_path / "a.json", [row, {"messages": row["messages"][:2]}]),
              validation="builtin").train_dataloader()  # fmt: skip


def test_a_conversation_may_begin_with_a_response(tokenizer):
    """It is trained where the chat template writes it, and counted where the template refuses it."""
    row, counts = ChatRow((Turn("assistant", "the"),)), Counter()
    ((ids, labels),) = Encoder(tokenizer, ExampleOptions(seq_len=64), counts)(row)
    assert supervised(tokenizer, labels) == "the</s>"
    assert labels[0] == -100 != ids[0]
    assert not counts
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    assert Encoder(tokenizer, ExampleOptions(seq_len=64), counts)(row) == []
    assert counts == {"refused by the chat template: no": 1}


def test_conversations_need_a_template(tokenizer, tmp_path):
    source = write(tmp_path / "a.json", [{"conversations": CHAT}])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="requires a chat template, and the tokenizer has none.*chat_template"):
        bound(tokenizer, recovery=source, validation="builtin").train_dataloader()
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    data = bound(tokenizer, recovery=source, validation="builtin", seq_len=200, chat_template=str(tmp_path / "t.jinja"))
    data.bind(tokenizer, vocab_size=61, max_positions=200)
    assert len(data.train_dataloader().dataset) == 1
    with pytest.raises(ConfigError, match="chat_template='nowhere' cannot be read"):
        bound(tokenizer, chat_template="nowhere")


def test_instructions_in_the_chat_template(tokenizer):
    encoder = Encoder(tokenizer, ExampleOptions(seq_len=64, template="chat"), Counter())
    ((ids, labels),) = encoder(InstructionRow(instruction="the", input="while", output="is a"))
    assert "".join(tokenizer.decode(ids).split()).endswith("assistantisa</s>")
    assert supervised(tokenizer, labels) == "isa</s>"


def encode_row(tokenizer, overlong, *, seq_len, output="is a statement of the language"):
    counts = Counter()
    encoder = Encoder(tokenizer, ExampleOptions(seq_len=seq_len, overlong=overlong, template="chat"), counts)
    return encoder(InstructionRow(instruction="the", input="", output=output)), counts


@pytest.mark.parametrize("seq_len", [5, 7, 12, 16])
def test_split_predicts_every_token_once(tokenizer, seq_len):
    ((ids, labels),), _ = encode_row(tokenizer, "split", seq_len=500)
    assert len(ids) > 16
    pieces, counts = encode_row(tokenizer, "split", seq_len=seq_len)
    assert all(len(piece[0]) <= seq_len for piece in pieces)
    predicted = [label for _, piece in pieces for label in piece[1:] if label != -100]
    assert predicted == [label for label in labels if label != -100]
    assert pieces[-1][0][-1] == pieces[-1][1][-1] == tokenizer.eos_token_id
    assert sum(tokenizer.eos_token_id in piece for _, piece in pieces) == 1
    assert sum(counts.values()) == 1


def test_cut_keeps_eos_and_prompts_alone_teach_nothing(tokenizer):
    ((ids, labels),), _ = encode_row(tokenizer, "cut", seq_len=500)
    prompt = labels.count(-100)
    ((cut, cut_labels),), counts = encode_row(tokenizer, "cut", seq_len=prompt + 4)
    assert cut == [*ids[: prompt + 3], tokenizer.eos_token_id]
    assert cut_labels == [*labels[: prompt + 3], tokenizer.eos_token_id]
    assert counts == {"longer than seq_len: cut, EOS kept": 1}
    for seq_len in (prompt - 2, prompt, prompt + 1):
        found, counts = encode_row(tokenizer, "cut", seq_len=seq_len)
        assert (found, counts) == ([], {"no supervised token": 1})
    assert encode_row(tokenizer, "drop", seq_len=prompt + 4) == ([], {"longer than seq_len": 1})


def test_what_is_left_out_is_said_with_counts(tokenizer, tmp_path):
    rows = [{"instruction": "the", "output": o} for o in ("is", "", "is " * 300, "of")]
    data = bound(tokenizer, recovery=write(tmp_path / "a.json", rows), validation="builtin", seq_len=300)
    data.bind(tokenizer, vocab_size=61, max_positions=400)
    with (
        pytest.warns(UserWarning, match=r"1 of 4 rows cannot be used: 1 no response \(row 2\)"),
        pytest.warns(UserWarning, match=r"left out or changed: 1 .longer than seq_len: split.; seq_len="),
    ):
        data.train_dataloader()
    assert data.summary()["recovery"]["dropped"] == {"no response": 1, "longer than seq_len: split": 1}


@given(st.lists(st.integers(1, 12), max_size=30))
def test_packs_hold_every_example_in_order(lengths):
    examples = [([i] * n, [i] * n) for i, n in enumerate(lengths)]
    rows = list(pack(examples, size=12))
    assert [example for row in rows for example in row] == examples
    sizes = [sum(len(ids) for ids, _ in row) for row in rows]
    assert all(size <= 12 for size in sizes)
    assert all(size + len(after[0][0]) > 12 for size, after in zip(sizes, rows[1:], strict=False))


@pytest.mark.parametrize("kind", ["instruction", "chat", "text"])
def test_packed_batches_have_the_loss_of_unpacked_ones(tokenizer, tmp_path, kind):
    outputs = ["is a", "of the language", "a", "is so", "the while statement", "and", "in it"]
    if kind == "text":
        rows = [{"text": f"{o} {o} and the {o}"} for o in outputs]
    elif kind == "chat":
        rows = [
            {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": o}]} for o in outputs
        ]
    else:
        rows = [{"instruction": "a", "output": o} for o in outputs]
    size = {"seq_len": 600 if kind == "instruction" else 40, "recovery_sequences": None, "validation": "builtin"}
    losses, shapes = [], []
    model = tiny("gpt2" if kind == "text" else "llama")
    if kind == "instruction":
        model.config.max_position_embeddings = 600
    source = write(tmp_path / "a.json", rows)
    for packing in (True, False):
        data = bound(tokenizer, recovery=source, packing=packing, **size)
        data.bind(tokenizer, vocab_size=61, max_positions=None)
        if kind == "text" and not packing:  # documents one by one, not joined
            encoder = Encoder(tokenizer, data.options, Counter())
            data._cache["recovery"] = [e for d in data._roles.documents("recovery") for e in encoder(d)]
        parts = [objective_sum(model, OBJECTIVES.get("cross_entropy"), batch) for batch in data.train_dataloader()]
        shapes.append(len(data.train_dataloader().dataset))
        losses.append((sum(total for total, _ in parts), sum(int(valid.sum()) for _, valid in parts)))
    assert shapes[0] < shapes[1]
    assert losses[0][1] == losses[1][1]
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*examples left out or changed")
def test_cache_is_used_for_its_key_alone(tokenizer, tmp_path, monkeypatch):
    rows = [{"instruction": "the", "output": o} for o in ("is", "", "of", "is " * 300)]
    source, folder = write(tmp_path / "a.json", rows), tmp_path / "cache"

    def made(**kwargs):
        data = bound(
            tokenizer, recovery=source, validation="builtin", token_cache=str(folder), **{"seq_len": 300} | kwargs
        )
        data.bind(tokenizer, vocab_size=61, max_positions=400)
        with pytest.warns(UserWarning, match="no response"):
            data.train_dataloader()
        return data._cache["recovery"]

    first = made()
    calls = []
    monkeypatch.setattr("hfprune.data.examples.encode_instruction", lambda *a: calls.append(1) or ([5, 6], [-100, 6]))
    assert made() == first
    assert not calls
    for other in ({"overlong": "drop"}, {"seq_len": 299}):
        made(**other)
        assert calls
        calls.clear()
    made(packing=True)  # the same examples
    assert not calls
    tokenizer.add_special_tokens({"eos_token": "<s>"})
    made()
    assert calls
    (file,) = [f for f in folder.iterdir() if f.stat().st_size][:1]
    file.write_bytes(b"damaged")
    assert not [f for f in folder.iterdir() if f.name.endswith(".tmp")]
    made()


def test_tokens_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    other = tiny_tokenizer(50)
    assert tokenizer_key(other) != tokenizer_key(tokenizer)
    tokenizer("the", padding="max_length", max_length=9)  # leaves its mark in the tokenizer, not in the key
    fresh = tiny_tokenizer()
    fresh.chat_template = TEMPLATE
    assert tokenizer_key(fresh) == tokenizer_key(tokenizer)
    path = tmp_path / "t.safetensors"
    save_file({"input_ids": token_ids(6, 10)}, path, metadata={"tokenizer": tokenizer_key(other)})
    with pytest.raises(ConfigError, match="was tokenised with another tokenizer"):
        bound(tokenizer, calibration=str(path)).calibration_dataloader()
    save_file({"input_ids": token_ids(6, 10)}, path, metadata={"tokenizer": tokenizer_key(tokenizer)})
    assert len(bound(tokenizer, calibration=str(path)).calibration_dataloader().dataset) == 4
