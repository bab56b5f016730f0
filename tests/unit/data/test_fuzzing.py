"""Mutated data files: each is read, or refused in one clear line; nothing else is raised and nothing is written."""

import bz2
import gzip
import json
import lzma
import random
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hfprune.cli import main
from hfprune.data import TextDataModule
from hfprune.utils.errors import HFPruneError
from tests.helpers.models import save_tiny, tiny_tokenizer

SEED = 18
ODD = (None, True, 0, -1, 2**70, 1.5, float("nan"), "", " ", "\ud800", "\x00", "x" * 100_000, [], {}, [[]], [None], ["a"],
       {"role": "user"}, [{"role": "user", "content": "a"}], [{"type": "text", "text": 3}])  # fmt: skip
LAYOUTS = (
    {"text": "the while is a"},
    {"instruction": "the", "input": "a", "output": "is"},
    {"prompt": "the", "completion": "is"},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "is"}]},
    {"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "is"}]},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
)
SUFFIXES = (
    ".jsonl",
    ".json",
    ".jsonl.gz",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    ".safetensors",
    ".json.xz",
    ".jsonl.zst",
    "",
)


def odd_value(draw, depth=0):
    if depth < 3 and draw.random() < 0.3:
        inner = [odd_value(draw, depth + 1) for _ in range(draw.randrange(3))]
        return (
            inner if draw.random() < 0.5 else {draw.choice(("text", "role", "content", "")): value for value in inner}
        )
    return draw.choice(ODD)


def bend(draw, value):
    """Replaces, removes or adds something at a random depth of a row."""
    if draw.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return odd_value(draw)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    copy, key = value.copy(), draw.choice(keys)
    if draw.random() < 0.25:
        del copy[key]
    else:
        copy[key] = bend(draw, value[key])
    return copy


def rows_of(draw):
    layout = json.dumps(draw.choice(LAYOUTS))
    share = draw.choice((0.1, 0.3, 1.0))
    words = ("the", "while", "is", "a", "e", "i", "o", "s", "t", "n", "r")
    rows = [
        json.loads(layout.replace("the", " ".join(draw.choices(words, k=6)))) for _ in range(draw.choice((1, 4, 12)))
    ]
    return [bend(draw, row) if draw.random() < share else row for row in rows]


def data_of(draw, rows):
    lines = [json.dumps(row) for row in rows]
    return draw.choice(
        (
            lambda: "\n".join(lines),
            lambda: json.dumps(rows),
            lambda: json.dumps({"data": rows}, indent=1),
            lambda: json.dumps(rows)[: draw.randrange(40)],
            lambda: "text,id\n" + "\n".join(f'"{n}{draw.choice(("", chr(34), ","))}",{n}' for n in range(9)),
            lambda: "",
        )
    )().encode("utf-8", "surrogatepass")


def damaged(draw, data):
    """Flips, cuts or inserts bytes."""
    kind = max(0, draw.randrange(-3, 4))
    if not data or kind == 0:
        return data
    at = draw.randrange(len(data))
    return (
        data[:at],
        data[:at] + b"\xff\x00\xfe" + data[at:],
        data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
    )[kind - 1]


def mutated(draw, folder):
    """Writes one file, or folder of files, and returns its name."""
    data = damaged(draw, data_of(draw, rows_of(draw)))
    packed = draw.choice((bytes, bytes, gzip.compress, bz2.compress, lzma.compress))(data)
    if draw.random() < 0.1:
        data = draw.randbytes(300)
    suffix = draw.choice(SUFFIXES)
    path = folder / f"a{suffix}"
    if suffix == ".parquet" and draw.random() < 0.7:
        column = pyarrow.array([draw.randbytes(3) for _ in range(6)]).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({draw.choice(("text", "input_ids", "body")): column}), path)
        path.write_bytes(damaged(draw, path.read_bytes()) if draw.random() < 0.4 else path.read_bytes())
    elif draw.random() < 0.1:
        path.mkdir()
        for number in range(draw.randrange(3)):
            (path / f"{number}{draw.choice(SUFFIXES[:4])}").write_bytes(packed)
    else:
        path.write_bytes(damaged(draw, packed) if draw.random() < 0.3 else packed)
    return draw.choice((str(path), str(path), f"{path}*", f"{path}:test"))


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    return found


@pytest.mark.parametrize("block", range(10))
def test_mutated_data_is_used_or_refused_in_one_line(tokenizer, tmp_path, block):
    used = 0
    for number in range(30):
        draw = random.Random(f"{SEED} {block} {number}")
        folder = tmp_path / str(number)
        folder.mkdir()
        source = mutated(draw, folder)
        before = contents(folder)
        streaming = draw.random() < 0.2
        refused = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = TextDataModule(recovery=source, validation="builtin", text="builtin", seq_len=8, streaming=streaming,
                                      packing=draw.random() < 0.3, shuffle_buffer=4)  # fmt: skip
                data.bind(tokenizer, vocab_size=61, max_positions=64)
                batch = next(iter(data.train_dataloader()))
            assert batch["input_ids"].shape == batch["labels"].shape
        except HFPruneError as error:
            refused = str(error)
        assert not refused or (source[:60] in refused and len(refused) < 2000), f"{number}: {refused}"
        assert contents(folder) == before
        used += not refused
    assert 0 < used < 30


def test_the_command_line_says_it_in_one_line_and_touches_no_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", "llama")
    Path("broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:-9])
    Path("bytes.jsonl").write_bytes(random.Random(SEED).randbytes(999))
    Path("empty.csv").touch()
    Path("nested.json").write_text("[" * 99_999)
    Path("folder").mkdir()
    Path("rows.jsonl").write_text('{"text": 1}\n{"text": null}\n{"text"\n')
    for source in (
        "broken.jsonl.gz",
        "bytes.jsonl",
        "empty.csv",
        "nested.json",
        "folder",
        "rows.jsonl",
        "*.xz",
        "model",
    ):
        flags = [f"--data.calibration={source}", "--data.text=builtin", "--data.seq_len=16", "--output_dir=out"]
        assert main(["prune", "--model.path=model", "--pruning_ratio=0.2", "--trainer.accelerator=cpu", *flags]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert [line for line in said.splitlines() if line.startswith("hfprune prune: error: ") and source in line]
        assert not Path("out").exists()
