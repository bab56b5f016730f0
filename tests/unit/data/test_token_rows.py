"""Data sets that somebody has tokenised: rows of several lengths, masks, labels."""

import datasets
import pytest

from hfprune.data import TextDataModule, load_rows
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny_tokenizer


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def bound(**kwargs):
    data = TextDataModule(**{"seq_len": 4, "eval_window": 4, "calibration_sequences": 2, "batch_size": 8} | kwargs)
    data.bind(tiny_tokenizer(), vocab_size=61, max_positions=64)
    return data


def test_rows_of_several_lengths(tmp_path):
    rows = [{"input_ids": [n, *range(10, 10 + n)], "attention_mask": [1] * n + [0]} for n in range(1, 6)]
    found = load_rows(saved(tmp_path / "a", rows))
    assert found.kind == "tokens"
    assert [ids for ids, _ in found.token_rows] == [[n, *range(10, 9 + n)] for n in range(1, 6)]
    source = str(tmp_path / "a")
    data = bound(calibration="builtin", recovery=source, validation="builtin", text="builtin")
    stream = [token for ids, _ in found.token_rows for token in ids]
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["input_ids"].tolist()) == sorted([stream[n : n + 4] for n in (0, 4, 8)])
    assert batch["labels"].equal(batch["input_ids"])
    windows = bound(calibration="builtin", text=source, eval_windows=None).evaluation_windows()
    assert windows.ids.tolist() == [stream[n : n + 4] for n in (0, 4, 8)]
    assert (
        bound(calibration=source, recovery="builtin", text="builtin")
        .calibration_dataloader()
        .dataset[1]["input_ids"]
        .tolist()
        == stream[4:8]
    )


def test_labels_are_kept_and_long_rows_are_split(tmp_path):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5, 6, 7, 8], "labels": [-100] * 3 + [7, 8]},
    ]
    data = bound(recovery=saved(tmp_path / "a", rows), validation="builtin", text="builtin")
    batch = next(iter(data.train_dataloader()))
    found = [
        (ids[:length], labels[:length])
        for ids, labels, length in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True
        )
    ]
    assert sorted(found) == [
        ([1, 2, 3], [-100, 2, 3]),
        ([4, 5, 6, 7], [-100, -100, -100, 7]),
        ([7, 8], [-100, 8]),
    ]


def test_rows_of_one_length_are_sequences(tmp_path):
    found = load_rows(saved(tmp_path / "a", [{"input_ids": [1, 2, 3]}] * 4))
    assert found.token_ids.tolist() == [[1, 2, 3]] * 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": None}, "empty"),
        ({"input_ids": [-1]}, "not token ids"),
        ({"input_ids": [1.0]}, "not token ids"),
        ({"input_ids": [[1]]}, "not token ids"),
        ({"input_ids": "1"}, "not token ids"),
        ({"input_ids": [2**70]}, "not token ids"),
        ({"input_ids": [1], "labels": [1, 2]}, "labels unlike the token ids"),
        ({"input_ids": [1], "labels": [-100]}, "no supervised token"),
        ({"input_ids": [1], "attention_mask": [0]}, "empty"),
        ({"input_ids": [1], "attention_mask": 1}, "attention mask unlike the token ids"),
    ],
)
def test_rows_that_are_no_tokens(tmp_path, row, reason):
    import json

    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"input_ids": [1, 2]}))
    found = load_rows(str(tmp_path / "a.jsonl"))
    assert (found.token_ids.tolist(), found.dropped) == ([[1, 2]], {reason: 1})


def test_ids_and_labels_that_the_model_does_not_know(tmp_path):
    for name, row in (("a", {"input_ids": [1, 99]}), ("b", {"input_ids": [1, 2], "labels": [-100, 99]})):
        source = saved(tmp_path / name, [row, {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
        with pytest.raises(ConfigError, match="contains token id 99, but the model has ids 0 to 60"):
            bound(recovery=source, validation="builtin", text="builtin").train_dataloader()


def test_too_few_tokens_for_one_sequence(tmp_path):
    source = saved(tmp_path / "a", [{"input_ids": [1]}, {"input_ids": [1, 2]}])
    with pytest.raises(ConfigError, match="fewer tokens than one sequence of seq_len=4"):
        bound(recovery=source, validation="builtin", text="builtin").train_dataloader()


def test_token_ids_are_not_streamed(tmp_path):
    source = saved(tmp_path / "a", [{"input_ids": [1, 2, 3, 4]}] * 3)
    data = bound(recovery=source, streaming=True, text="builtin")
    with pytest.raises(ConfigError, match="holds token ids, which streaming=True cannot read"):
        next(iter(data.train_dataloader()))
