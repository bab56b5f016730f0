"""Which columns mean what, and why a row is left out."""

import json
import warnings

import pytest

from hfprune.data import ChatRow, InstructionRow, Turn, load_rows
from hfprune.data.roles import Roles
from hfprune.utils.errors import ConfigError

PARTS = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
EXCHANGE = ChatRow((Turn("user", "hello"), Turn("assistant", "b")))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def say(speaker, text, names=("role", "content")):
    return dict(zip(names, (speaker, text), strict=True))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, ("a", "", "b")),
        ({"prompt": "a", "response": "b"}, ("a", "", "b")),
        ({"question": "a", "answer": "b"}, ("a", "", "b")),
        ({"question": "a", "context": "c", "answer": "b"}, ("a", "c", "b")),
        ({"instruction": "a", "context": "c", "response": "b", "category": "q"}, ("a", "c", "b")),
        ({"instruction": "a", "input": "c", "output": "b", "text": "a c b"}, ("a", "c", "b")),
    ],
)
def test_prompts_with_responses(tmp_path, row, expected):
    found = load_rows(lines(tmp_path / "a.jsonl", [row]))
    assert found.instructions == (
        InstructionRow(**dict(zip(("instruction", "input", "output"), expected, strict=True))),
    )


def test_text_goes_before_prompts_and_a_named_column_before_all(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"text": "t", "prompt": "a", "completion": "b", "messages_of": "x"}])
    assert load_rows(source).texts == ("t",)
    source = lines(tmp_path / "b.jsonl", [{"instruction": "a", "output": "b"}])
    assert load_rows(source, text_field="output").texts == ("b",)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [say("user", PARTS), say("assistant", [{"text": "b"}])]},
        {"conversations": [say("human", "hello", ("from", "value")), say("gpt", "b", ("from", "value"))]},
        {"conversation": [say("user", "hello"), say("assistant", "b"), say("user", "more")]},
        {"prompt": [say("user", "hello")], "completion": [say("assistant", "b")]},
    ],
)
def test_conversations(tmp_path, row):
    assert load_rows(lines(tmp_path / "a.jsonl", [row] * 2)).chats == (EXCHANGE, EXCHANGE)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [say("user", [{"type": "image"}]), say("assistant", "b")]}, "not text"),
        ({"messages": [say("user", "x"), say("tool", "1"), say("assistant", "b")]}, "unknown speaker"),
        ({"messages": [say(["user"], "x"), say("assistant", "b")]}, "unknown speaker"),
        ({"messages": [say("user", "x"), say("assistant", None)]}, "not text"),
        ({"messages": [say("user", "x")]}, "no response"),
        ({"messages": "user: x"}, "not text"),
        ({"messages": None}, "empty"),
        ({"question": "a", "answer": 42}, "not text"),
        ({"question": "a", "answer": None}, "no response"),
        ({"question": " ", "answer": "b"}, "no instruction"),
        ({"text": ["a"]}, "not text"),
        ({"text": "\ud800"}, "not UTF-8"),
    ],
)
def test_the_reason_and_the_row_are_in_the_message(tmp_path, row, reason):
    with pytest.raises(ConfigError, match=rf"holds no .*: 3 {reason} \(first: row 1.*\)\.$"):
        load_rows(lines(tmp_path / "a.jsonl", [row] * 3))


def test_an_odd_row_does_not_decide_the_layout(tmp_path):
    rows = load_rows(lines(tmp_path / "a.jsonl", [{"messages": []}, *[{"text": "x"}] * 4]))
    assert (rows.texts, rows.dropped) == (("x",) * 4, {"empty": 1})


@pytest.mark.parametrize("speaker", ["tool", 3, None])
def test_a_speaker_that_is_not_known_is_named(tmp_path, speaker):
    source = lines(tmp_path / "a.jsonl", [{"messages": [say("user", "x"), say(speaker, "1"), say("assistant", "b")]}])
    with pytest.raises(
        ConfigError, match=f"1 unknown speaker .row 1: {speaker!r} is none of system, user and assistant"
    ):
        load_rows(source)


def test_columns_that_are_not_understood_are_listed(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ConfigError, match=r"It has: chosen, prompt, rejected\. .*rename 'chosen' to 'completion'"):
        load_rows(source)
    with pytest.raises(ConfigError, match=r"It has: chosen, prompt, rejected\. Name the column .* text_field\."):
        load_rows(source, text_field="body")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (1, r"a.jsonl': 1 of 4 rows cannot be used: 1 empty \(row 1\)\.$"),
        (4, r"more than half of the rows are left out: 4 of 7 rows cannot be used: 4 empty \(first: row 1\)\.$"),
    ],
)
def test_rows_left_out_are_said_once(tmp_path, bad, told):
    source = lines(tmp_path / "a.jsonl", [{"text": ""}] * bad + [{"text": f"x {n}"} for n in range(3)])
    roles = Roles({"calibration": source, "recovery": source}, split="train", text_field=None, seed=0)
    with pytest.warns(UserWarning, match=told):
        roles.rows("calibration")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roles.rows("recovery")
