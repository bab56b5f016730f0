"""The survey of all classes: one row for each, also for those that hang or crash."""

import json
import os
import time

import pytest

from hfprune.cli import main
from hfprune.publishing import survey as module
from hfprune.publishing.survey import Row, classes, counts, survey
from hfprune.publishing.survey_table import survey_page, survey_text
from hfprune.utils.errors import ConfigError

PROVEN = Row(
    model_class="LlamaForCausalLM",
    model_type="llama",
    verdict="proven",
    source="table",
    units={"mlp": "", "heads": "", "layers": "", "channels": ""},
    stated={"mlp": "", "heads": "a stock config has other counts"},
)
PART = Row(
    model_class="Olmo2ForCausalLM",
    model_type="olmo2",
    verdict="in part",
    source="derived",
    units={"mlp": "", "heads": "a norm runs over all heads | of a layer", "experts": "", "layers": ""},
    claims={"packing": "documents mix"},
)
REFUSED = Row(model_class="BltForCausalLM", model_type="blt", reason="it needs <pictures>")


def scripted(connection):
    """Stands for the process of a worker: hangs, crashes or answers as the model type says."""
    connection.send(None)
    while True:
        model_class, model_type = connection.recv()
        if model_type == "hang":
            time.sleep(60)
        if model_type == "crash":
            os._exit(7)
        connection.send(Row(model_class=model_class, model_type=model_type, verdict="proven"))


def test_a_class_that_hangs_or_crashes_costs_one_row(monkeypatch):
    monkeypatch.setattr(module, "_serve", scripted)
    monkeypatch.setattr(module, "classes", lambda: {"A": "ok", "B": "hang", "C": "crash", "D": "ok", "E": "crash"})
    rows = {row.model_class: row for row in survey(jobs=2, time_limit=2)}
    assert {name: row.verdict for name, row in rows.items()} == {
        "A": "proven",
        "B": "refused",
        "C": "refused",
        "D": "proven",
        "E": "refused",
    }
    assert rows["B"].reason == "it took longer than 2 s"
    assert rows["C"].reason == rows["E"].reason == "its process ended with exit code 7"


def test_counts_are_of_what_can_be_removed():
    assert counts([PROVEN, PART, REFUSED]) == {
        "proven": 1,
        "in part": 1,
        "refused": 1,
        "mlp": 2,
        "heads": 1,
        "experts": 1,
        "layers": 2,
        "channels": 1,
    }


def test_the_text_and_the_page_hold_every_class_and_reason():
    rows = [PROVEN, PART, REFUSED]
    text, page = survey_text(rows), survey_page(rows)
    for row in rows:
        assert row.model_class in text
        assert row.model_class in page
    assert "no heads: a norm runs over all heads" in text
    assert "| LlamaForCausalLM | yes | per layer | - | yes | yes | yes | table |" in page
    assert "| Olmo2ForCausalLM | yes | no | yes | yes | - | no | derived |" in page
    assert "| Olmo2ForCausalLM | heads | a norm runs over all heads \\| of a layer |" in page
    assert "| BltForCausalLM | it needs \\<pictures> |" in page
    assert "Of 3 classes 1 are proven" in page


def test_every_class_of_transformers_is_tried_once():
    known = classes()
    assert known["Gemma3ForCausalLM"] == "gemma3_text"
    assert len(known) > 150
    assert "T5ForConditionalGeneration" not in known


def test_unknown_names_and_numbers_are_refused_at_once():
    with pytest.raises(
        ConfigError, match="'LamaForCausalLM' is neither a class nor a model type .* 'LlamaForCausalLM'"
    ):
        list(survey(["LamaForCausalLM"]))
    with pytest.raises(ConfigError, match="jobs=0"):
        list(survey(jobs=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either a folder or hub id (OUT), or --all"),
        (["x", "--all"], "Give either a folder or hub id (OUT), or --all"),
        (["x", "--markdown"], "--classes and --markdown need --all"),
        (["--all", "--json", "--markdown"], "Give either --json or --markdown"),
        (["--all", "--classes", "llam"], "Did you mean 'llama'?"),
        (["--all", "--jobs", "0"], "must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_the_command_prints_words_or_json(monkeypatch, capsys):
    monkeypatch.setattr(module, "survey", lambda names, jobs, time_limit: iter([PART, PROVEN, REFUSED]))
    assert main(["inspect", "--all"]) == 0
    out = capsys.readouterr()
    assert out.out == survey_text([REFUSED, PROVEN, PART]) + "\n"
    assert "2: LlamaForCausalLM: proven" in out.err
    assert main(["inspect", "--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["model_class"] for entry in found["classes"]] == [r.model_class for r in (REFUSED, PROVEN, PART)]
    assert found["counts"]["proven"] == 1
    assert main(["inspect", "--all", "--markdown"]) == 0
    assert capsys.readouterr().out == survey_page([REFUSED, PROVEN, PART])


def test_one_real_class_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path))
    (row,) = survey(["llama"])
    assert (row.model_class, row.verdict, row.source) == ("LlamaForCausalLM", "proven", "table")
    assert all(row.removable(kind) for kind in ("mlp", "heads", "layers", "channels"))
    assert "experts" not in row.units
