"""Every kind of source, and every way a source can be bad."""

import gzip
import json

import datasets
import pytest
import torch
from safetensors.torch import save_file

from hfprune.data.sources import check_source, load_rows
from hfprune.utils.errors import ConfigError

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "  "}]
ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
    {"instruction": "Nothing.", "input": "", "output": ""},
]


def write(path, data):
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n"),
        ("s.json", json.dumps(["one", "two", ""])),
        ("c.jsonl", '{"content": "one", "n": 1}\n\n{"content": "two", "n": 2}\n{"content": null}'),
    ],
)
def test_json_kinds(tmp_path, name, data, suffix):
    rows = load_rows(write(tmp_path / (name + suffix), data))
    assert rows.texts == ("one", "two")
    assert rows.dropped == {"empty": 1}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_files_are_one_running_text_with_unix_line_ends(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    raw = b"first\r\nline\r\n\r\nsecond\r\n"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    rows = load_rows(str(path))
    assert rows.running == "first\nline\n\nsecond\n"
    assert rows.texts == ("first\nline", "second\n")


def test_parquet_and_save_to_disk(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    assert load_rows(str(tmp_path / "a.parquet")).texts == ("one", "two")
    assert load_rows(str(tmp_path / "saved")).texts == ("one", "two")
    assert load_rows(str(tmp_path / "splits"), split="test").texts == ("one",)
    with pytest.raises(ConfigError, match="no split 'dev'. It has: train, test"):
        load_rows(str(tmp_path / "splits"), split="dev")


def test_alpaca_layout_leaves_out_empty_responses(tmp_path):
    rows = load_rows(write(tmp_path / "a.json", json.dumps(ALPACA)))
    assert rows.kind == "instruction"
    assert [r.output for r in rows.instructions] == ["3", "hi"]
    assert rows.dropped == {"no response": 1}


def test_text_without_blank_lines_is_a_document_a_line(tmp_path):
    rows = load_rows(write(tmp_path / "a.txt", "one\ntwo\nthree\n"))
    assert rows.texts == ("one", "two", "three")


def test_rows_as_one_text_keep_the_empty_ones(tmp_path):
    rows = load_rows(write(tmp_path / "a.json", json.dumps(["", " = A = \n", "", "b", "b"])))
    assert rows.running == "\n\n".join(["", " = A = \n", "", "b", "b"])


def test_text_field_does_not_hide_the_alpaca_layout(tmp_path):
    assert load_rows(write(tmp_path / "a.json", json.dumps(ALPACA)), text_field="body").kind == "instruction"


def test_token_ids(tmp_path):
    save_file({"input_ids": torch.arange(6, dtype=torch.int32).view(2, 3)}, tmp_path / "t.safetensors")
    assert load_rows(str(tmp_path / "t.safetensors")).token_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    save_file({"ids": torch.zeros(3)}, tmp_path / "u.safetensors")
    with pytest.raises(ConfigError, match=r"must hold an integer tensor 'input_ids'.*ids \[3\]"):
        load_rows(str(tmp_path / "u.safetensors"))
    (tmp_path / "v.safetensors").write_bytes(b"not")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        load_rows(str(tmp_path / "v.safetensors"))


def test_builtin_is_a_lot_of_english():
    rows = load_rows("builtin")
    assert sum(map(len, rows.texts)) > 300_000
    assert len(rows.texts) > 50
    assert rows.running == "\n\n".join(rows.texts)


def test_named_column(tmp_path):
    source = write(tmp_path / "a.json", json.dumps([{"text": "no", "body": "yes"}]))
    assert load_rows(source, text_field="body").texts == ("yes",)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.json", "[1, 2", "not valid JSON"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '[{"q": "x", "a": "y"}]', "has no column 'text'.*It has: a, q"),
        ("a.json", '[{"text": ""}]', "holds no text"),
        ("a.json", '[{"instruction": "x", "output": ""}]', "no example with an instruction and an output"),
        ("a.jsonl", '{"text": 1}\n{"text"', r"holds no text: 1 not text \(row 1\), 1 not JSON \(row 2: Expecting"),
        ("a.txt", " \n\n ", "holds no text"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", "[" + "9" * 5000 + "]", "not valid JSON"),
        ("a.json", '[{"text": "x"},\n{"text": "y"},\n', "not valid JSON"),
        ("a.csv", 'text\nx\n"y\nz\n', "a quoted field that begins in line 3 never ends"),
    ],
)
def test_bad_content(tmp_path, name, data, match):
    with pytest.raises(ConfigError, match=match):
        load_rows(write(tmp_path / name, data))


def test_bad_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_rows(str(tmp_path / "a.txt"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"some text" * 100)[:20])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rows(str(tmp_path / "c.txt.gz"))
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rows(str(tmp_path / "d.parquet"))


def test_paths_are_checked_by_name_alone(tmp_path):
    (tmp_path / "wiki_test.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"text='.*wiki_tset.txt' does not exist. Did you mean '.*wiki_test.txt'"):
        check_source(str(tmp_path / "wiki_tset.txt"), "--data.text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a folder without supported files"):
        check_source(str(tmp_path / "empty"), "--data.text")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="files of type '.png' are not read"):
        check_source(str(tmp_path / "x.png"), "--data.text")
    deep = tmp_path.joinpath(*["folder"] * 20)
    deep.mkdir(parents=True)
    (deep / "wiki_test.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"text='.*/wiki_tset.txt' does not exist. Did you mean '.*/wiki_test.txt'"):
        check_source(str(deep / "wiki_tset.txt"), "--data.text")
    for hub in ("wikitext", "allenai/c4", "allenai/c4:en", "allenai/c4:en:validation"):
        check_source(hub, "--data.text")


def test_hub_id_without_network_is_one_line():
    with pytest.raises(ConfigError, match=r"Cannot load the data set 'nobody/nothing-here': [^\n]+$"):
        load_rows("nobody/nothing-here")


def test_fields_that_are_not_text_are_left_out_and_counted(tmp_path):
    good = {"instruction": "Add.", "output": "3"}
    bad = [{**good, "input": 3}, {**good, "instruction": ["x"]}, {**good, "instruction": " "}, {**good, "output": None}]
    rows = load_rows(write(tmp_path / "a.json", json.dumps([*bad, {**good, "input": None}])))
    assert [(r.instruction, r.input, r.output) for r in rows.instructions] == [("Add.", "", "3")]
    assert rows.dropped == {"not text": 2, "no instruction": 1, "no response": 1}
    rows = load_rows(write(tmp_path / "b.json", json.dumps([{"text": 5}, {"text": ""}, {"text": "y"}])))
    assert rows.texts == ("y",)
    assert rows.dropped == {"not text": 1, "empty": 1}


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert load_rows(write(tmp_path / "a.jsonl", '\ufeff{"text": "x"}')).texts == ("x",)
    assert load_rows(write(tmp_path / "a.txt.gz", "\ufeffx")).texts == ("x",)


def test_a_name_too_long_for_the_file_system():
    with pytest.raises(ConfigError, match=r"text='a{80}\.\.\.' cannot be looked up: File name too long"):
        check_source("a" * 5000, "text")


def test_truth_values_are_not_token_ids(tmp_path):
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.bool)}, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=r"must hold an integer tensor.*torch.bool"):
        load_rows(str(tmp_path / "t.safetensors"))


class Hub:
    """Stands for ``datasets.load_dataset``: counts the rows that are asked for."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.read, self.asked = rows, 0, []
        monkeypatch.setattr(datasets, "load_dataset", self)

    def __call__(self, name, config, *, split, streaming):
        self.asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(self._rows)

    def _rows(self):
        for number in range(self.rows):
            self.read += 1
            yield {"text": f"row {number}"}


def test_a_hub_data_set_is_streamed_and_read_no_further_than_needed(monkeypatch):
    hub = Hub(monkeypatch, rows=10_000)
    monkeypatch.setattr("hfprune.data.sources.HUB_ROWS", 50)
    with pytest.warns(UserWarning, match="'owner/big:en:test' has more than 50 rows; the first 50 are used"):
        rows = load_rows("owner/big:en:test")
    assert rows.texts == tuple(f"row {number}" for number in range(50))
    assert hub.read <= 52
    assert hub.asked == [("owner/big", "en", "test", True)]


def test_a_smaller_hub_data_set_is_read_whole(monkeypatch):
    hub = Hub(monkeypatch, rows=50)
    monkeypatch.setattr("hfprune.data.sources.HUB_ROWS", 50)
    assert len(load_rows("owner/small", split="dev").texts) == 50
    assert hub.asked == [("owner/small", None, "dev", True)]


def test_a_hub_data_set_that_breaks_off_is_one_line(monkeypatch):
    def broken(*args, **kwargs):
        def rows():
            yield {"text": "x"}
            raise OSError("the line\nis cut")

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(ConfigError, match=r"Cannot load the data set 'owner/x': [^\n]+$"):
        load_rows("owner/x")
