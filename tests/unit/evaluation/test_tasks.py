"""Local copies of the papers' tasks ask what lm-eval's own tasks ask."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from hfprune.evaluation.tasks import GROUPS_FOLDER, LOCAL_FOLDER
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.utils.errors import ConfigError

STOCK = Path(lm_eval.tasks.__file__).parent
TASKS = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "crows_pairs_english": "crows_pairs/crows_pairs_english.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "race": "race/race.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mnli": "glue/mnli/default.yaml",
    "wnli": "glue/wnli/default.yaml",
    "rte": "glue/rte/default.yaml",
}
WHERE_DATA_COME_FROM = {"dataset_path", "dataset_name", "custom_dataset", "tag"}
SPLITS = {"training_split", "validation_split", "test_split"}


def comparable(value):
    """Functions by where they are defined: the harness loads the same file under several names."""
    if callable(value):
        code = value.__code__
        return (code.co_filename, code.co_name, code.co_firstlineno)
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items()}
    return [comparable(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", TASKS)
def test_everything_but_the_data_is_the_stock_task(name):
    stock, local = load_yaml(STOCK / TASKS[name]), load_yaml(LOCAL_FOLDER / f"{name}.yaml")
    ours, theirs = (
        {k: comparable(v) for k, v in task.items() if k not in WHERE_DATA_COME_FROM | SPLITS} for task in (local, stock)
    )
    assert ours == theirs
    evaluated = stock.get("test_split") or stock["validation_split"]
    assert {k: v for k, v in local.items() if k in SPLITS} == {
        "test_split" if stock.get("test_split") else "validation_split": evaluated
    }


def test_the_list_is_complete():
    assert sorted(TASKS) == sorted(path.stem for path in LOCAL_FOLDER.glob("*.yaml"))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def arc_rows():
    letters = [{"text": "ice", "label": "A"}, {"text": "steam", "label": "B"}]
    numbers = [{"text": "one", "label": "1"}, {"text": "two", "label": "2"}, {"text": "three", "label": "3"}]
    return [
        {"id": "x", "question": {"stem": "What melts?", "choices": letters}, "answerKey": "A"},
        {"id": "y", "question": {"stem": "Count?", "choices": numbers}, "answerKey": "3"},
    ]


def race_passage():
    return {
        "article": "Tom has a cat.",
        "questions": ["Tom has  _  .", "Who has a cat?", "The cat  _  ."],
        "options": [["a dog", "a cat", "a cow", "a hen"], ["Ann", "Bob", "Tom", "Eve"], ["runs", "sits", "eats", "is"]],
        "answers": ["B", "C", "D"],
    }


def released(name, folder):
    """Writes a few rows as the data set was released."""
    if name in ("arc_easy", "arc_challenge"):
        write_lines(
            folder / {"arc_easy": "ARC-Easy-Test.jsonl", "arc_challenge": "arc_challenge_test.jsonl"}[name], arc_rows()
        )
    elif name == "boolq":
        rows = [("is ice cold", "Ice is cold.", "true"), ("is ice hot", "Ice is cold.", "false")]
        write_lines(
            folder / "BoolQ/val.jsonl", [{"question": q, "passage": p, "idx": 0, "label": a} for q, p, a in rows]
        )
    elif name == "crows_pairs_english":
        with (folder / "crows_pairs_anonymized.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
            writer.writerow([0, 'They said "no", twice.', "They said no.", "stereo", "age"])
    elif name == "openbookqa":
        write_lines(folder / "openbookqa_test.jsonl", arc_rows())
    elif name == "piqa":
        write_lines(folder / "piqa/valid.jsonl", [{"goal": "Cool tea?", "sol1": "Wait.", "sol2": "Heat it."}] * 2)
        (folder / "piqa/valid-labels.lst").write_text("0\n1\n")
    elif name == "race":
        with tarfile.open(folder / "race_dev.tar.gz", "w:gz") as archive:
            for kind in ("high", "middle"):
                data = json.dumps(race_passage()).encode()
                member = tarfile.TarInfo(f"RACE/dev/{kind}/1.txt")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    elif name == "social_iqa":
        row = {"context": "Ann fell.", "question": "What now?", "options": ["cry", "run", "sing"], "answer": "run"}
        write_lines(folder / "siqa_dev.jsonl", [row])
    elif name.startswith("truthfulqa"):
        row = {
            "question": "Is it?",
            "mc1_targets": {"Yes.": 1, "No.": 0},
            "mc2_targets": {"Yes.": 1, "So.": 1, "No.": 0},
        }
        (folder / "mc_task.json").write_text("\ufeff" + json.dumps([row]))
    elif name == "winogrande":
        row = {"sentence": "Ann met Eve as _ was late.", "option1": "Ann", "option2": "Eve", "answer": "2"}
        write_lines(folder / "winogrande_1.1/dev.jsonl", [row])
    elif name == "hellaswag":
        row = {"ind": 1, "activity_label": "Tea", "ctx_a": "A cup.", "ctx_b": "a man", "ctx": "A cup. a man", "label": 1,
               "endings": ["drinks [title] it.", "sits  down [step] ok."], "source_id": "s", "split": "val", "split_type": "i"}  # fmt: skip
        write_lines(folder / "hellaswag_val.jsonl", [row])
    elif name == "mnli":
        (folder / "MNLI").mkdir()
        text = 'index\tsentence1\tsentence2\tgold_label\n0\tA "quoted man.\tHe sits\tneutral\n'
        (folder / "MNLI/dev_matched.tsv").write_text(text)
    elif name == "wnli":
        (folder / "wnli_dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tIt ran.\tA dog ran.\t1\n")
    else:
        write_lines(
            folder / "RTE/val.jsonl",
            [{"premise": "It ran.", "hypothesis": "A dog ran.", "label": "not_entailment", "idx": 0}],
        )


QA = (
    "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\nA: Dwight D. Eisenhower was president of the United States in "
    "1955.\n\nQ: Which party did he belong to?\nA: He belonged to the Republican Party.\n\nQ: What is the square root of "
    "banana?\nA: I have no comment.\n\nQ: How does a telescope work?\nA: Telescopes use lenses or mirrors to focus light "
    "and make objects appear closer.\n\nQ: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, "
    "Spain.\n\nQ: Is it?\nA:"
)  # fmt: skip
EXPECTED = {  # prompt, choices, gold of every row, worked out by hand from the stock task
    "arc_easy": [
        ("Question: What melts?\nAnswer:", ["ice", "steam"], 0),
        ("Question: Count?\nAnswer:", ["one", "two", "three"], 2),
    ],
    "boolq": [
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1),
        ("Ice is cold.\nQuestion: is ice hot?\nAnswer:", ["no", "yes"], 0),
    ],
    "crows_pairs_english": [("", ['They said "no", twice.', "They said no."], 0)],
    "openbookqa": [("What melts?", ["ice", "steam"], 0), ("Count?", ["one", "two", "three"], 2)],
    "piqa": [
        ("Question: Cool tea?\nAnswer:", ["Wait.", "Heat it."], 0),
        ("Question: Cool tea?\nAnswer:", ["Wait.", "Heat it."], 1),
    ],
    "race": [
        (
            "Article: Tom has a cat.\n\nTom has a cat\nQuestion: Who has a cat?\nAnswer: Tom\nThe cat  _  .",
            ["runs", "sits", "eats", "is"],
            3,
        )
    ],
    "social_iqa": [("Q: Ann fell. What now?\nA:", ["cry", "run", "sing"], 1)],
    "truthfulqa_mc1": [(QA, ["Yes.", "No."], 0)],
    "truthfulqa_mc2": [(QA, ["Yes.", "So.", "No."], 0)],
    "winogrande": [(1, ["Ann met Eve as Ann", "Ann met Eve as Eve"], "was late.")],
    "hellaswag": [("Tea: A cup. A man", ["drinks. it.", "sits down ok."], 1)],
    "mnli": [('A "quoted man.\nQuestion: He sits. True, False or Neither?\nAnswer:', ["True", "Neither", "False"], 1)],
    "wnli": [("It ran.\nQuestion: A dog ran. True or False?\nAnswer:", ["False", "True"], 1)],
    "rte": [("It ran.\nQuestion: A dog ran. True or False?\nAnswer:", ["True", "False"], 1)],
}
EXPECTED["arc_challenge"] = EXPECTED["arc_easy"]


def asked(task):
    return [(task.doc_to_text(d), list(task.doc_to_choice(d)), task.doc_to_target(d)) for d in task.eval_docs]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_gold_answers(name, tmp_path):
    released(name, tmp_path)
    (task,) = ZeroShotTasks([name], data_dir=str(tmp_path)).load()
    assert asked(task) == EXPECTED[name]


ROWS = {
    "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "crows_pairs_english": 1508, "openbookqa": 500, "piqa": 1838,
    "race": 1021, "social_iqa": 1954, "truthfulqa_mc2": 817, "winogrande": 1267, "hellaswag": 1000, "wnli": 71, "rte": 277,
}  # fmt: skip


def test_the_released_files_are_read_whole(shared_dir):
    tasks = ZeroShotTasks(list(ROWS), data_dir=str(shared_dir / "data")).load()
    assert {task.task_name: len(task.eval_docs) for task in tasks} == ROWS
    for task in tasks:
        if task.task_name != "winogrande":  # its gold answer is the text that both continue with
            gold = [(int(task.doc_to_target(d)), len(task.doc_to_choice(d))) for d in task.eval_docs]
            assert all(0 <= answer < choices for answer, choices in gold)


GROUPS = {
    "paper10": "arc_challenge arc_easy boolq crows_pairs_english openbookqa piqa race social_iqa truthfulqa_mc2 winogrande",
    "llmpruner7": "boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa",
    "zpruner5": "hellaswag boolq winogrande mnli wnli",
}


def test_groups_are_stock_tasks():
    index = TaskManager(include_path=str(GROUPS_FOLDER)).task_index
    assert {path.stem for path in GROUPS_FOLDER.glob("*.yaml")} == set(GROUPS)
    for name, tasks in GROUPS.items():
        assert index[name].cfg["task"] == tasks.split()
        assert all(STOCK in index[task].yaml_path.parents for task in tasks.split())


def test_a_group_is_its_tasks(shared_dir):
    tasks = ZeroShotTasks(["llmpruner7", "boolq"], data_dir=str(shared_dir / "data")).load()
    assert sorted(t.task_name for t in tasks) == sorted(load_yaml(GROUPS_FOLDER / "llmpruner7.yaml")["task"])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Task boolq finds none of its files in .*BoolQ/val.jsonl"):
        ZeroShotTasks(["boolq"], data_dir=str(tmp_path)).load()
    write_lines(tmp_path / "piqa_valid.jsonl", [{"goal": "a", "sol1": "b", "sol2": "c"}])
    with pytest.raises(ConfigError, match=r"are missing \(piqa_valid-labels.lst in the same folder\)"):
        ZeroShotTasks(["piqa"], data_dir=str(tmp_path)).load()
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(ConfigError, match="has 1 rows, its labels are 2"):
        ZeroShotTasks(["piqa"], data_dir=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "passage": "b", "label": "true"}\n{"que', "line 2, cannot be read"),
        ('{"question": "a", "passage": "b", "label": "maybe"}', "Row 1.* KeyError 'maybe'"),
        ("", "holds no rows"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    (tmp_path / "boolq_val.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ZeroShotTasks(["boolq"], data_dir=str(tmp_path)).load()


DAMAGED = {  # task -> files, and what the error says besides the file's name
    "row": ("boolq", {"boolq_val.jsonl": '\n{"passage": "p", "label": "true"}'}, "Row 2 .*boolq_val.jsonl"),
    "null": ("boolq", {"boolq_val.jsonl": '{"question": null, "passage": "p", "label": "true"}'}, "no question"),
    "gzip": ("boolq", {"boolq_val.jsonl.gz": b"\x1f\x8b\x08\0\0\0\0\0\0\3\xff\xff\xff\xff"}, "boolq_val.jsonl.gz' cannot"),
    "word": ("piqa", {"valid.jsonl": '{"goal": "g", "sol1": "a", "sol2": "b"}', "valid-labels.lst": "x"}, "valid.jsonl.*'x'"),
    "range": ("piqa", {"valid.jsonl": '{"goal": "g", "sol1": "a", "sol2": "b"}', "valid-labels.lst": "2"}, "not one of 0 to 1"),
    "list": ("piqa", {"valid.jsonl": "[1]", "valid-labels.lst": "0"}, "line 1, holds a JSON list"),
    "archive": ("race", {"race_dev.tar.gz": "no archive"}, "race_dev.tar.gz' cannot be read"),
    "passage": ("race", {"RACE/test/high/7.txt": "{"}, "high/7.txt' cannot be read"),
    "blank": ("winogrande", {"winogrande_dev.jsonl": '{"sentence": "a _.", "option1": "b", "option2": "c", "answer": ""}'}, "Row 1"),
    "short": ("crows_pairs_english", {"crows_pairs_anonymized.csv": "sent_more,sent_less,stereo_antistereo,bias_type\na"}, "no sent_less"),
    "order": ("truthfulqa_mc1", {"mc_task.json": '[{"question": "q", "mc1_targets": {"n": 0, "y": 1}, "mc2_targets": {"y": 1}}]'}, "first of mc1"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "files", "message"), DAMAGED.values(), ids=DAMAGED)
def test_other_damage_is_named(tmp_path, name, files, message):
    write_files(tmp_path, files)
    with pytest.raises(ConfigError, match=message):
        ZeroShotTasks([name], data_dir=str(tmp_path)).load()


SIQA = '{"context": "Ann fell.", "question": "What now?", "answerA": "cry", "answerB": "run", "answerC": "sing"}'
OTHER_LAYOUTS = {
    "social_iqa": {"socialiqa-train-dev/dev.jsonl": SIQA, "socialiqa-train-dev/dev-labels.lst": "2\n"},
    "race": {"RACE/test/high/1.txt": json.dumps(race_passage()), "RACE/dev/high/1.txt": "{}"},
    "boolq": {
        "dev.jsonl": '{"question": "is ice cold", "passage": "Ice is cold.", "title": "Ice", "answer": true}\n'
        '{"question": "is ice hot", "passage": "Ice is cold.", "title": "Ice", "answer": false}\n'
    },
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_other_released_layouts(name, tmp_path):
    write_files(tmp_path, OTHER_LAYOUTS[name])
    (task,) = ZeroShotTasks([name], data_dir=str(tmp_path)).load()
    assert asked(task) == EXPECTED[name]


def test_the_first_of_two_equal_right_answers_is_gold(tmp_path):
    row = {"context": "c", "question": "q", "options": ["a", "b", "b"], "answer": "b"}
    write_lines(tmp_path / "siqa_dev.jsonl", [row])
    (task,) = ZeroShotTasks(["social_iqa"], data_dir=str(tmp_path)).load()
    assert [int(task.doc_to_target(doc)) for doc in task.eval_docs] == [1]  # as argmax does on a tie


def test_a_folder_must_be_given():
    reader = load_yaml(LOCAL_FOLDER / "boolq.yaml")["custom_dataset"]
    with pytest.raises(ValueError, match="data_dir"):
        reader(version=2.0)


def test_an_answer_that_is_no_choice(tmp_path):
    rows = arc_rows()
    rows[1]["answerKey"] = "C"
    write_lines(tmp_path / "ARC-Easy-Test.jsonl", rows)
    with pytest.raises(ConfigError, match="Row 2.*'C' is none of the labels"):
        ZeroShotTasks(["arc_easy"], data_dir=str(tmp_path)).load()


def test_local_copies_have_nothing_to_show(tmp_path):
    with pytest.raises(ConfigError, match="num_fewshot=.* must be 0 with data_dir"):
        ZeroShotTasks(["boolq"], data_dir=str(tmp_path), num_fewshot=5)
