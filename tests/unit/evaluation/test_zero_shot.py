import json
import logging
import math
import statistics

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from hfprune.evaluation import zero_shot
from hfprune.evaluation.zero_shot import ZeroShotTasks
from hfprune.report.table import stage_table
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny, tiny_tokenizer

ROWS = [
    {"question": "the assert is", "choices": ["is", "of", "in"], "gold": 1},
    {"question": "while", "choices": ["it", "the statement"], "gold": 0},
    {"question": "of", "choices": ["a a a", "in"], "gold": 1},
    {"question": "the", "choices": ["a", "b", "c"], "gold": 2},
    {"question": "it", "choices": ["is a", "is b"], "gold": 0},
]


@pytest.fixture
def folder(tmp_path):
    """A task of one's own: a YAML file beside its data."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "mine.yaml").write_text(f"""
task: my_task
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 3.0}}
""")
    return str(tmp_path)


@pytest.fixture(autouse=True)
def _few_tasks(monkeypatch):
    """Listing the harness's fourteen thousand tasks takes ten seconds."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager

    def small(**kwargs):
        return manager(**kwargs | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)


def by_hand(model, tokenizer):
    """acc and acc_norm from whole logits: sums of log-probabilities, and those divided by the answers' characters."""
    acc, norm = [], []
    for row in ROWS:
        prompt = f"Q: {row['question']}\nA:"
        scores = []
        for choice in row["choices"]:
            context, whole = (
                tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, f"{prompt} {choice}")
            )
            with torch.no_grad():
                log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        lengths = [len(choice) for choice in row["choices"]]
        acc.append(scores.index(max(scores)) == row["gold"])
        normed = [s / n for s, n in zip(scores, lengths, strict=True)]
        norm.append(normed.index(max(normed)) == row["gold"])
    return acc, norm


@pytest.mark.parametrize("share", [None, False])
def test_figures_equal_those_by_hand(folder, share):
    model, tokenizer = tiny(), tiny_tokenizer()
    found = ZeroShotTasks(["my_task"], include_path=folder, share_prefixes=share).run(model, tokenizer)
    task = found.tasks["my_task"]
    acc, norm = by_hand(model, tokenizer)
    assert 0 < statistics.fmean(acc) < 1
    assert task.metrics == {"acc": statistics.fmean(acc), "acc_norm": statistics.fmean(norm)}
    assert task.stderr["acc"] == pytest.approx(statistics.stdev(map(float, acc)) / math.sqrt(5))
    assert (task.num_items, task.version) == (5, "3.0")
    assert found.average == statistics.fmean(norm)
    assert found.average_acc == statistics.fmean(acc)
    report = json.loads(json.dumps(found.to_dict()))
    assert report["tasks"]["my_task"]["acc_stderr"] == task.stderr["acc"]
    assert report["harness"]


def test_limit_takes_the_first_items(folder):
    model, tokenizer = tiny(), tiny_tokenizer()
    found = ZeroShotTasks(["my_task"], include_path=folder, limit=2).run(model, tokenizer)
    acc, _ = by_hand(model, tokenizer)
    assert found.tasks["my_task"].num_items == 2
    assert found.tasks["my_task"].metrics["acc"] == statistics.fmean(acc[:2])


def test_says_how_many_examples_the_task_showed(folder, tmp_path):
    """A task file may ask for examples itself, or refuse them whatever the flag says."""
    lines = (tmp_path / "mine.yaml").read_text()
    for shots in (0, 2):
        text = lines.replace("task: my_task", f"task: shots_{shots}\nfewshot_split: test\nnum_fewshot: {shots}")
        (tmp_path / f"shots_{shots}.yaml").write_text(text)
    asked = ["my_task", "shots_0", "shots_2"]
    found = ZeroShotTasks(asked, include_path=folder).run(tiny(), tiny_tokenizer())
    assert {name: task.num_fewshot for name, task in found.tasks.items()} == dict(zip(asked, (0, 0, 2), strict=True))
    assert "0 or 2-shot" in stage_table({"model": {"zero_shot": found.to_dict()}}).caption
    none = ZeroShotTasks(["shots_2"], include_path=folder, num_fewshot=0).run(tiny(), tiny_tokenizer())
    assert none.tasks["shots_2"].num_fewshot == 0


def test_every_filter_has_its_figure():
    """Tasks with generated answers (GSM8K) read them in several ways."""
    results = {"exact_match,strict": 0.25, "exact_match,flexible": 0.5, "exact_match_stderr,strict": 0.1, "alias": "t"}
    found = {"results": {"t": results}, "n-samples": {"t": {"effective": 4}}, "n-shot": {"t": 5}, "versions": {}}
    task = zero_shot._result(found, "t")
    assert task.metrics == {"exact_match,strict": 0.25, "exact_match,flexible": 0.5}
    assert task.stderr == {"exact_match,strict": 0.1}


def test_runs_again_on_another_model_and_leaves_random_numbers_alone(folder):
    tasks, model = ZeroShotTasks(["my_task"], include_path=folder), tiny()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = tasks.run(model, tiny_tokenizer())
    assert torch.equal(torch.rand(2), expected)
    other = tiny()
    with torch.no_grad():
        other.model.norm.weight.neg_()  # every preference turned round
    assert tasks.run(other, tiny_tokenizer()).tasks != first.tasks
    assert tasks.run(tiny(), tiny_tokenizer()).tasks == first.tasks
    assert logging.getLogger("lm_eval").level != logging.ERROR


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["my_tusk"], {}, "unknown task 'my_tusk'. Nearest: my_task"),
        (["paper11"], {}, "Nearest: paper10"),
        ([], {}, "must name at least one task"),
        (["my_task"], {"limit": 0}, "limit=0 must be at least 1"),
        (["my_task"], {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (["my_task"], {"data_dir": "nowhere"}, "data_dir='nowhere' is not a folder"),
        (["my_task"], {"include_path": "nowhere"}, "include_path='nowhere' is not a folder"),
    ],
)
def test_bad_input(folder, names, settings, message):
    with pytest.raises(ConfigError, match=message):
        ZeroShotTasks(names, **{"include_path": folder} | settings)


def test_missing_data_are_said_before_a_model_is_needed(folder, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match="data of the tasks my_task cannot be read: .*data_dir"):
        ZeroShotTasks(["my_task"], include_path=folder).load()


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"hfprune\[eval\]"):
        ZeroShotTasks(["arc_easy"])


@pytest.mark.slow
def test_equals_the_harness_command_line(shared_dir, tmp_path):
    """The embedded model on the same files: every figure that lm-eval's own command line prints."""
    import subprocess
    import sys

    from hfprune.evaluation.tasks import LOCAL_FOLDER
    from hfprune.io.demo_model import embedded_model
    from hfprune.io.load import load_causal_lm, load_tokenizer

    names, data = ["arc_easy", "openbookqa", "piqa", "race", "truthfulqa_mc2", "winogrande"], str(shared_dir / "data")
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1",
        "--model_args", f"pretrained={embedded_model()}", "--tasks", ",".join(names), "--limit", "8",
        "--include_path", str(LOCAL_FOLDER), "--metadata", json.dumps({"data_dir": data}),
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (file,) = (tmp_path / "out").rglob("*.json")
    expected = json.loads(file.read_text())["results"]
    tasks = ZeroShotTasks(names, data_dir=data, limit=8)
    found = tasks.run(load_causal_lm("smollm2-135m"), load_tokenizer("smollm2-135m"))
    for name in names:
        metrics = {key.removesuffix(",none"): value for key, value in expected[name].items() if key.endswith(",none")}
        for metric, value in found.tasks[name].metrics.items():
            assert value == pytest.approx(metrics[metric], abs=1e-5), (name, metric)
            assert found.tasks[name].stderr[metric] == pytest.approx(metrics[f"{metric}_stderr"], abs=1e-5)
    assert {"acc", "acc_norm"} <= found.tasks["arc_easy"].metrics.keys()
