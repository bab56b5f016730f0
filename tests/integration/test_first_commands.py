"""Whole runs of the commands that people type first."""

import json
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.version import __version__ as version
from tests.helpers.models import save_tiny
from tests.helpers.runs import TINY_DATA_FLAGS, TINY_FLAGS

pytestmark = pytest.mark.usefixtures("empty_folder", "undrawn")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "dense"))


def plan_of(folder):
    return json.loads(Path(folder, "report.json").read_text())["plan"]


def test_prune_then_evaluate_the_output_folder(dense, caplog):
    caplog.set_level("INFO", logger="hfprune")
    assert main(["prune", dense, "--ratio", "0.2", "-o", "out", *TINY_FLAGS]) == 0
    messages = caplog.text
    assert "Recipe fast (of best, fast, paper)" in messages
    assert "round_to auto: no multiple of 64 is within 3% of the budget, the width is exact" in messages
    plan = plan_of("out")
    assert (plan["criterion"]["name"], plan["compensation"]["name"]) == ("activation_norm", "LeastSquares")
    flags = ["--dense", dense, "-o", "figures.json", "--latency", "false", *TINY_DATA_FLAGS[2:]]
    assert main(["evaluate", "out", *flags]) == 0
    assert json.loads(Path("figures.json").read_text())["stages"]["model"]["fidelity"]["kl"] > 0


def test_a_method_is_the_same_model_in_prune_and_sweep(dense):
    assert main(["prune", dense, "--method", "entropy", "--ratio", "0.2", "-o", "out", *TINY_FLAGS]) == 0
    plan = plan_of("out")
    assert (plan["criterion"]["name"], plan["objective"], plan["compensation"]) == (
        "activation_taylor",
        "entropy",
        None,
    )
    Path("words.txt").write_text("The assert is a statement of the language and so is while. " * 20)
    sweep = ["sweep", dense, "--methods", "entropy,fast", "--ratios", "0.2", "--data.text", "words.txt", "-o", "sweep"]
    assert main([*sweep, "--latency", "false", *TINY_DATA_FLAGS]) == 0
    rows = json.loads(Path("sweep/table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "entropy", "fast"]


def test_a_class_of_the_current_folder(dense):
    Path("my_project.py").write_text(
        "from hfprune.criteria import ActivationNorm\n\n\nclass MyCriterion(ActivationNorm):\n    name = 'mine'\n"
    )
    flags = ["--ratio", "0.2", "--importance.criterion", "my_project.MyCriterion"]
    assert main(["prune", dense, *flags, "-o", "out", *TINY_FLAGS]) == 0
    assert plan_of("out")["criterion"]["name"] == "mine"


def test_a_class_that_cannot_be_imported_gives_the_reason(dense, capsys):
    Path("broken_project.py").write_text("import nothing_there\n\n\nclass Mine: ...\n")
    flags = ["--ratio", "0.2", "--importance.criterion", "broken_project.Mine"]
    assert main(["prune", dense, *flags, "-o", "out", *TINY_FLAGS]) == 2
    assert "'broken_project' cannot be imported: No module named 'nothing_there'" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["prune", "fit", "sweep", "export"])
def test_a_command_alone_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setattr("hfprune.cli.launch.launch", lambda *_: pytest.fail("started"))
    assert main([command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is required" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "m"], "unknown command 'eval'. Did you mean 'evaluate'?"),
        (["compress", "m"], "Did you mean 'prune'?"),
        (["finetune", "m"], "Did you mean 'fit'?"),
        (["dry-run", "m"], "Did you mean 'plan'?"),
        (["."], "'.' is no command. To prune this model: hfprune prune . --ratio 0.2 -o OUT"),
        (["plan", "m", "0.2"], "'0.2' belongs to no flag. Did you mean --ratio 0.2?"),
        (["plan", "m", "--ratio", "20"], "20 is not between 0 and 1"),
        (["plan", "m", "--ratio", "a"], "'a' is no share of all parameters, for example 0.2"),
        (["chat", "m", "who are you"], "Did you mean --prompt 'who are you'?"),
    ],
)
def test_words_of_other_tools_are_answered_in_one_line(args, message, capsys, monkeypatch):
    for module in ("plan", "chat"):
        monkeypatch.setattr(f"hfprune.cli.{module}.importing", lambda: pytest.fail("imports"))
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["help"], "commands:"),
        (["help", "prune"], "hfprune prune"),
        (["prune", "help"], "hfprune prune"),
        (["version"], version),
        (["-V"], version),
    ],
)
def test_help_and_version_as_words(args, shown, capsys):
    assert main(args) == 0
    assert shown in capsys.readouterr().out


def test_a_name_that_is_no_folder_was_looked_up_on_the_hub(capsys):
    assert main(["prune", "nothing", "--ratio=0.2", "-o", "out"]) == 2
    assert "there is no such folder; it was looked up on the hub" in capsys.readouterr().err
