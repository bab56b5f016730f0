"""Files as people have them: names that say something else, compressions, tables, and rows that are broken."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hfprune.data import load_rows
from hfprune.data.files import file_type, is_whole
from hfprune.utils.errors import ConfigError

TEXTS = tuple(f"document {n}\nof two lines" for n in range(6))
LINES = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in TEXTS)


def zstd(data):
    found = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(found, "zstd") as file:
        file.write(data)
    return found.getvalue().to_pybytes()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def table(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["c4-train.00000-of-01024.json.gz", "a.json", "a.jsonl", "a.ndjson", "A.JSONL", "a.txt", "corpus", "a.jsonl.1"],
)
def test_json_lines_under_any_name(tmp_path, name):
    assert load_rows(write(tmp_path / name, LINES)).texts == TEXTS


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "data",
    [
        [{"text": text} for text in TEXTS],
        list(TEXTS),
        {"version": "1", "data": [{"text": text} for text in TEXTS]},
        {"text": list(TEXTS), "id": list(range(6))},
        {"text": {str(n): text for n, text in enumerate(TEXTS)}},
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_one_json_value_under_any_name(tmp_path, name, data, indent):
    assert load_rows(write(tmp_path / name, json.dumps(data, indent=indent))).texts == TEXTS


def test_one_object_is_one_row(tmp_path):
    assert load_rows(write(tmp_path / "a.json", json.dumps({"text": "x"}, indent=2))).texts == ("x",)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert len(load_rows(write(tmp_path / "b.json", json.dumps(chat))).chats) == 1


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compression_is_read_from_the_content(tmp_path, compress):
    data = compress(LINES.encode())
    for name in ("a.jsonl.gz", "a.jsonl.bz2", "a.json.xz", "a.jsonl.zst", "a.jsonl"):
        assert load_rows(write(tmp_path / name, data)).texts == TEXTS
    assert load_rows(write(tmp_path / "two.jsonl", data + data)).texts == TEXTS * 2
    assert load_rows(write(tmp_path / "t.txt", compress(b"one\n\ntwo"))).running == "one\n\ntwo"
    assert load_rows(write(tmp_path / "t.csv", compress(b"text\none\n"))).texts == ("one",)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rows(write(tmp_path / "b.jsonl", data[:-20]))


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_tables(tmp_path, name, delimiter):
    source = table(tmp_path / name, [("id", "text"), *enumerate(TEXTS)], delimiter)
    assert load_rows(source).texts == TEXTS
    assert load_rows(source, text_field="id").texts == tuple("012345")


def test_rows_that_are_broken_cost_themselves(tmp_path):
    good = b"text,id\nx,1\n"
    rows = load_rows(write(tmp_path / "a.csv", good + b'a,b,c\nalone\n"a" b,1\nb\xffd,1\n\ny,2\n'))
    assert rows.texts == ("x", "y")
    assert rows.dropped == {"with another number of fields than the header": 2, "not CSV": 1, "not UTF-8": 1}
    assert "2 with another number of fields than the header (first: row 2: line 3)" in str(rows.losses)
    bad = b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": \n\n"x"\n[1]\n5\n{"other": 1}\n\xff\xfe\n'
    rows = load_rows(write(tmp_path / "a.jsonl", LINES.encode() + bad))
    assert rows.texts == TEXTS
    assert rows.dropped == {"not UTF-8": 3, "not JSON": 1, "not an object": 3, "empty": 1}
    rows = load_rows(write(tmp_path / "a.txt", b"one\n\ntw\xffo\n\nthree"))
    assert (rows.texts, rows.running, rows.dropped) == (("one", "three"), "one\n\nthree", {"not UTF-8": 1})


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    column = pyarrow.array([b"one", b"tw\xffo", b"three"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert (rows.texts, rows.dropped) == (("one", "three"), {"not UTF-8": 1})


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.parquet", "a.safetensors", "a"])
def test_pointers_of_git_lfs_are_said(tmp_path, name):
    source = write(tmp_path / name, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ConfigError, match="is a Git LFS pointer.*git lfs pull"):
        load_rows(source)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf16_is_said(tmp_path, name):
    with pytest.raises(ConfigError, match="not UTF-8 text but UTF-16"):
        load_rows(write(tmp_path / name, LINES.encode("utf-16")))


def test_what_tells_a_value_from_lines(tmp_path):
    for whole in ('[\n{"text": "x"}\n]', '{\n"text": "x"\n}', '[{"text": "x"}]', '[\n{"text": "x"},\n{"text": "y"}\n]'):
        assert is_whole(tmp_path.joinpath(write(tmp_path / "a.json", whole)))
    for lines in ("", '{"text": "x"}', '{"text":\n{"text": "x"}', '"x"\n"y"', '[log] x\n{"text": "x"}'):
        assert not is_whole(tmp_path.joinpath(write(tmp_path / "a.json", lines)))
    assert file_type(tmp_path.joinpath(write(tmp_path / "x.bin", "plain"))) is None


# ---- places ------------------------------------------------------------------------------------------------------------


def shards(folder, names):
    for number, name in enumerate(names):
        write(folder / name, json.dumps({"text": TEXTS[number]}) + "\n")
    return folder


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    folder = shards(tmp_path / "d", ["part-2.jsonl", "part-0.jsonl", "part-1.jsonl"])
    write(folder / "README.md", "# about")
    write(folder / ".hidden.jsonl", "{")
    write(folder / "dataset_infos.json", "{}")
    ordered = (TEXTS[1], TEXTS[2], TEXTS[0])
    for source in (folder, f"{folder}/", f"{folder}/*.jsonl", f"{tmp_path}/**/part-?.jsonl", tmp_path):
        assert load_rows(str(source)).texts == ordered
    with pytest.raises(ConfigError, match=r"\*.csv': no file matches"):
        load_rows(f"{folder}/*.csv")
    write(folder / "a.csv", "text\nx\n")
    with pytest.raises(ConfigError, match=r"files of several types \(1 .csv, 3 .jsonl\)"):
        load_rows(str(folder))
    shards(tmp_path / "e", ["x.jsonl"])
    with pytest.raises(ConfigError, match="files in several folders; name one: .*d, .*e"):
        load_rows(str(tmp_path))


def test_splits_of_folders(tmp_path):
    folder = shards(tmp_path / "d", ["data/train-00001.jsonl", "data/train-00000.jsonl", "data/dev.jsonl"])
    assert load_rows(str(folder)).texts == (TEXTS[1], TEXTS[0])
    for named in ("validation", "dev"):
        assert load_rows(f"{folder}:{named}").texts == (TEXTS[2],)
        assert load_rows(str(folder), split=named).texts == (TEXTS[2],)
    with pytest.raises(ConfigError, match="has no split 'test'. Its files are of: train, validation"):
        load_rows(f"{folder}:test")
    assert load_rows(str(shards(tmp_path / "e", ["test.jsonl"]))).texts == (TEXTS[0],)  # all that there is
    data = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "saved")
    assert load_rows(f"{tmp_path}/saved:test").texts == ("two",)
    with pytest.raises(ConfigError, match="no split 'dev'. It has: train, test"):
        load_rows(f"{tmp_path}/saved:dev")
    data.save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigError, match="one data set without splits: remove ':test'"):
        load_rows(f"{tmp_path}/one:test")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shards(tmp_path / "d", ["test.jsonl", "train.jsonl"])
    for source, texts in (("~/d/test.jsonl", TEXTS[:1]), ("~/d/*.jsonl", TEXTS[:2]), ("~/d:train", TEXTS[1:2])):
        assert load_rows(source).texts == texts
    with pytest.raises(ConfigError, match="no such user"):
        load_rows("~nobody-of-this-name/a.jsonl")
