"""Readers of released data sets, which return the format of the stock tasks' hub data sets.

lm-eval calls them as ``custom_dataset`` with the task's metadata, including ``data_dir``. Each returns the split that
the stock task evaluates, without caching.
"""

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from hfprune.utils.errors import ConfigError

Row = dict[str, Any]


def arc_easy(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns ARC-Easy's test split."""
    return _arc("arc_easy", data_dir, "ARC-Easy-Test.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl", "arc_easy_test.jsonl")


def arc_challenge(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns ARC-Challenge's test split."""
    names = ("ARC-Challenge-Test.jsonl", "ARC-Challenge/ARC-Challenge-Test.jsonl", "arc_challenge_test.jsonl")
    return _arc("arc_challenge", data_dir, *names)


def _arc(task: str, data_dir: str | None, *names: str) -> DatasetDict:
    def convert(row: Row) -> Row:
        return {"id": row["id"], "question": row["question"]["stem"], **_labelled(row)}

    path = _find(task, data_dir, *names)
    return _split("test", _converted(_json_lines(path), convert, path))


def _labelled(row: Row) -> Row:
    """Returns the choices as columns and the answer, which must be one of their labels."""
    choices = row["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of the labels {labels}")
    return {
        "choices": {"text": [choice["text"] for choice in choices], "label": labels},
        "answerKey": row["answerKey"],
    }


def boolq(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns BoolQ's validation split; labels are booleans, or words as in SuperGLUE."""
    path = _find("boolq", data_dir, "BoolQ/val.jsonl", "boolq_val.jsonl", "boolq_val.jsonl.gz", "dev.jsonl")

    def convert(row: Row) -> Row:
        label = {"true": 1, "false": 0}[str(row.get("label", row.get("answer"))).lower()]
        return {"question": row["question"], "passage": row["passage"], "idx": row.get("idx", 0), "label": label}

    return _split("validation", _converted(_json_lines(path), convert, path))


def crows_pairs_english(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns the released CrowS-Pairs, 1,508 pairs."""
    path = _find("crows_pairs_english", data_dir, "crows_pairs_anonymized.csv")
    names = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    return _split("test", _converted(_table(path, ","), lambda row: {name: row[name] for name in names}, path))


def openbookqa(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns OpenBookQA's test split."""
    path = _find("openbookqa", data_dir, "openbookqa_test.jsonl", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl")

    def convert(row: Row) -> Row:
        return {"id": row["id"], "question_stem": row["question"]["stem"], **_labelled(row)}

    return _split("test", _converted(_json_lines(path), convert, path))


def piqa(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns PIQA's validation split, with labels from a separate file."""
    path = _find("piqa", data_dir, "piqa_valid.jsonl", "piqa/valid.jsonl", "valid.jsonl")

    def convert(row: Row) -> Row:
        return {name: row[name] for name in ("goal", "sol1", "sol2")} | {"label": _choice(row["label"], 0, 2)}

    return _split("validation", _converted(_with_labels("piqa", path), convert, path))


def race(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns RACE-high, one row per passage: the stock task asks the last question after the answered others."""
    path = _find("race", data_dir, "RACE/test/high", "test/high", "RACE/dev/high", "race_dev.tar.gz")

    def convert(row: Row) -> Row:
        problems = [
            {"question": question, "answer": answer, "options": options}
            for question, answer, options in zip(row["questions"], row["answers"], row["options"], strict=True)
        ]
        return {"article": row["article"], "problems": str(problems)}

    return _split("test", _converted(_race_rows(path), convert, path))


def _race_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields the passages sorted by name."""
    if path.is_dir():
        for number, passage in enumerate(sorted(path.glob("*.txt")), 1):
            yield number, _parsed(passage, partial(json.loads, _text(passage)))
        return
    for number, (name, raw) in enumerate(_parsed(path, partial(_race_members, path)), 1):
        yield number, _parsed(path / name, partial(json.loads, raw))


def _race_members(path: Path) -> list[tuple[str, bytes]]:
    """Returns names and contents of the passages ``high`` in an archive."""
    with tarfile.open(path) as archive:
        opened = ((m.name, archive.extractfile(m)) for m in archive if "/high/" in m.name and m.isfile())
        return sorted((name, file.read()) for name, file in opened if file is not None)


def social_iqa(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns Social IQa's validation split, with labels from a separate file or given as text."""
    path = _find("social_iqa", data_dir, "siqa_dev.jsonl", "socialiqa-train-dev/dev.jsonl", "socialIWa_v1.4_dev.jsonl")

    def convert(row: Row) -> Row:
        if "options" in row:
            options, label = row["options"], row["options"].index(row["answer"]) + 1
        else:
            options, label = [row[f"answer{letter}"] for letter in "ABC"], _choice(row["label"], 1, 3)
        answers = dict(zip(("answerA", "answerB", "answerC"), options, strict=True))
        return {"context": row["context"], "question": row["question"], **answers, "label": str(label)}

    rows = _with_labels("social_iqa", path) if path.name == "dev.jsonl" else _json_lines(path)
    return _split("validation", _converted(rows, convert, path))


def truthfulqa_mc1(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns TruthfulQA's multiple-choice set."""
    path = _find("truthfulqa", data_dir, "truthfulqa_mc_task.json", "mc_task.json", "data/mc_task.json")

    def convert(row: Row) -> Row:
        targets = {
            name: {"choices": list(row[name]), "labels": list(row[name].values())}
            for name in ("mc1_targets", "mc2_targets")
        }
        if targets["mc1_targets"]["labels"][0] != 1:  # the stock task's gold answer is the first
            raise ValueError("the first of mc1_targets is not the correct one")
        return {"question": row["question"], **targets}

    rows = _parsed(path, lambda: json.loads(_text(path)))
    if not isinstance(rows, list):
        raise ConfigError(f"'{path}' holds a JSON {type(rows).__name__}; a list of questions is expected.")
    return _split("validation", _converted(enumerate(rows, 1), convert, path))


truthfulqa_mc2 = truthfulqa_mc1


def winogrande(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns WinoGrande's validation split."""
    path = _find("winogrande", data_dir, "winogrande_1.1/dev.jsonl", "winogrande_dev.jsonl")
    names = ("sentence", "option1", "option2", "answer")

    def convert(row: Row) -> Row:
        _choice(row["answer"], 1, 2)
        row["sentence"].index("_")
        return {name: row[name] for name in names}

    return _split("validation", _converted(_json_lines(path), convert, path))


def hellaswag(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns HellaSwag's validation split, or the part of it in the file."""
    path = _find("hellaswag", data_dir, "hellaswag_val.jsonl", "hellaswag_val_1000.jsonl")
    names = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type")

    def convert(row: Row) -> Row:
        return {name: row[name] for name in names} | {"label": str(_choice(row["label"], 0, len(row["endings"])))}

    return _split("validation", _converted(_json_lines(path), convert, path))


def mnli(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns MNLI's matched validation split, from GLUE's file."""
    path = _find("mnli", data_dir, "MNLI/dev_matched.tsv", "mnli_dev_matched.tsv")
    labels = ("entailment", "neutral", "contradiction")

    def convert(row: Row) -> Row:
        return {
            "premise": row["sentence1"],
            "hypothesis": row["sentence2"],
            "label": labels.index(row["gold_label"]),
            "idx": int(row["index"]),
        }

    return _split("validation_matched", _converted(_table(path, "\t"), convert, path))


def wnli(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns WNLI's validation split, from GLUE's file."""
    path = _find("wnli", data_dir, "WNLI/dev.tsv", "wnli_dev.tsv")

    def convert(row: Row) -> Row:
        return {name: row[name] for name in ("sentence1", "sentence2")} | {"label": _choice(row["label"], 0, 2)}

    return _split("validation", _converted(_table(path, "\t"), convert, path))


def rte(*, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Returns RTE's validation split, from SuperGLUE's file; GLUE has the same pairs."""
    path = _find("rte", data_dir, "RTE/val.jsonl", "rte_val.jsonl")
    labels = ("entailment", "not_entailment")

    def convert(row: Row) -> Row:
        return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": labels.index(row["label"])}

    return _split("validation", _converted(_json_lines(path), convert, path))


# ---- files -----------------------------------------------------------------------------------------------------------


def _find(task: str, data_dir: str | None, *names: str) -> Path:
    """Returns the first of ``names`` that exists in ``data_dir``."""
    if data_dir is None:
        raise ConfigError(f"Task {task} reads local files: set data_dir in the metadata to their folder.")
    found = next((path for name in names if (path := Path(data_dir) / name).exists()), None)
    if found is None:
        raise ConfigError(f"Task {task} finds none of its files in '{data_dir}': {', '.join(names)}.")
    return found


def _with_labels(task: str, path: Path) -> list[tuple[int, Row]]:
    """Returns the rows with the labels of the file ``-labels.lst`` in the same folder."""
    file = path.with_name(f"{path.stem}-labels.lst")
    if not file.is_file():
        raise ConfigError(f"Task {task}: the labels of '{path}' are missing ({file.name} in the same folder).")
    rows, labels = list(_json_lines(path)), _text(file).split()
    if len(rows) != len(labels):
        raise ConfigError(f"Task {task}: '{path}' has {len(rows)} rows, its labels are {len(labels)}.")
    return [(number, row | {"label": label}) for (number, row), label in zip(rows, labels, strict=True)]


def _choice(label: Any, first: int, count: int) -> int:
    """Returns a label as the number of one of ``count`` choices, which are numbered from ``first``."""
    number = int(label)
    if not first <= number < first + count:
        raise ValueError(f"label {label!r} is not one of {first} to {first + count - 1}")
    return number


def _text(path: Path) -> str:
    def read() -> str:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")

    return str(_parsed(path, read))


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a JSON-lines file with their line numbers."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            row = _parsed(path, partial(json.loads, line), number)
            if not isinstance(row, dict):
                raise ConfigError(f"'{path}', line {number}, holds a JSON {type(row).__name__}, not an object.")
            yield number, row


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a CSV file, or of a TSV file without quoting."""
    file = io.StringIO(_text(path), newline="")
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader: Iterator[Row] = csv.DictReader(file, delimiter=delimiter, quoting=quoting)  # type: ignore[call-overload]
    yield from enumerate(reader, 2)


def _parsed(path: Path, parse: Callable[[], Any], number: int | None = None) -> Any:
    try:
        return parse()
    except (ValueError, OSError, EOFError, zlib.error, tarfile.TarError) as error:
        where = "" if number is None else f", line {number},"
        raise ConfigError(f"'{path}'{where} cannot be read: {error}.") from error


def _converted(rows: Iterable[tuple[int, Row]], convert: Callable[[Row], Row], path: Path) -> list[Row]:
    """Returns the converted rows; raises ``ConfigError`` with the number of an invalid row."""
    found = []
    for number, row in rows:
        try:
            found.append(convert(row))
            if empty := [name for name, value in found[-1].items() if value is None]:
                raise ValueError(f"no {', '.join(empty)}")
        except (AttributeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"Row {number} of '{path}' is not laid out as released: {type(error).__name__} {error}."
            ) from error
    if not found:
        raise ConfigError(f"'{path}' holds no rows.")
    return found


def _split(name: str, rows: list[Row]) -> DatasetDict:
    return DatasetDict({name: Dataset.from_list(rows)})
