"""One parser for structured, sparse and LoRA pruning: which one is meant, and what cannot be combined."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hfprune import LoraPruningCallback, SparsePruningCallback, TaylorImportanceCallback
from hfprune.cli import main
from hfprune.cli.launch import CLASSES
from tests.helpers.published import unchecked
from tests.helpers.runs import TINY_FLAGS

ROOT = Path(__file__).resolve().parents[2]
RATIO, SPARSE, LORA = ["--pruning_ratio=0.2"], ["--method=wanda", "--sparsity=0.5"], ["--lora_prune.every=10"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sparse.yaml").write_text('method: {class_path: Wanda, init_args: {scope: matrix}}\nsparsity: "2:4"\n')
    Path("lora.yaml").write_text("pruning_ratio: 0.2\nlora_prune: {units: [mlp]}\n")
    Path("empty.yaml").write_text("pruning_ratio: 0.2\nlora_prune: {}\n")
    Path("every.yaml").write_text("every: 5\n")


@pytest.mark.parametrize(
    ("command", "flags", "kind"),
    [
        ("prune", RATIO, TaylorImportanceCallback),
        ("fit", RATIO, TaylorImportanceCallback),
        ("prune", SPARSE, SparsePruningCallback),
        ("fit", [*SPARSE, "--update=sparsegpt", "--sparse.recovery=full"], SparsePruningCallback),
        ("prune", ["--config=sparse.yaml"], SparsePruningCallback),
        ("prune", [*RATIO, "--method=null", "--config=sparse.yaml", "--sparsity=null"], TaylorImportanceCallback),
        ("fit", [*LORA, *RATIO], LoraPruningCallback),
        ("fit", ["--config=lora.yaml"], LoraPruningCallback),
        ("fit", [*RATIO, "--lora_prune=every.yaml"], LoraPruningCallback),
        ("fit", [*RATIO, "--lora_prune.every=10", "--layout=per_layer", "--round_to=2"], LoraPruningCallback),
    ],
)
def test_the_flags_select_the_callback(command, flags, kind, monkeypatch):
    unchecked(monkeypatch)
    cli = CLASSES[command](command, [*flags, "--model.path=m", "--output_dir=out"])
    (found,) = (
        c for c in cli.trainer.callbacks if c.__class__.__name__.endswith(("ImportanceCallback", "PruningCallback"))
    )
    assert type(found) is kind
    groups = {"importance", "sparse", "lora_prune"} & cli.plain_config().keys()
    assert groups == {cli.kind.group}
    if "--lora_prune=every.yaml" in flags:
        assert found.every == 5
    if command == "fit" and kind is TaylorImportanceCallback:
        assert found.recovery.rank == 32


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("prune", ["--sparsity=0.5"], "--method is required with --sparsity: a name (magnitude"),
        ("prune", ["--method=wanda"], "--sparsity is required with --method: share of zeros (0.5)"),
        ("prune", ["--update=sparsegpt"], "--method is required with --update"),
        ("fit", ["--sparse.offload=disk"], "--method is required with --sparse.offload"),
        ("prune", [*SPARSE, *RATIO], "give --sparsity for a share of zeros, or --pruning_ratio without --method"),
        ("prune", ["--config=sparse.yaml", *RATIO], "or --pruning_ratio without --method and --sparsity"),
        ("prune", [*SPARSE, "--importance.rounds=2"], "--importance.rounds belongs to pruning that removes units"),
        ("fit", [*SPARSE, *LORA], "--lora_prune.every belongs to pruning that removes units while adapters train"),
        ("prune", [*SPARSE, "--layout=padded"], "--layout belongs to pruning that removes units"),
        ("fit", [*RATIO, *LORA, "--mlp_ratio=2"], "--lora_prune.*: remove --mlp_ratio."),
        ("fit", [*RATIO, *LORA, "--importance.rounds=2"], "They cannot be combined: remove one of them."),
        ("prune", [*RATIO, *LORA], "--lora_prune.every prunes while LoRA adapters train: use hfprune fit."),
        ("fit", ["--config=empty.yaml"], "'lora_prune' is empty"),
        ("prune", [*RATIO, "--units=[mlp]"], "Did you mean 'importance.units' or 'lora_prune.units'?"),
    ],
)
def test_kinds_are_not_mixed(command, flags, message, dense, capsys):
    assert main([command, *flags, f"--model.path={dense}", "--output_dir=out", *TINY_FLAGS]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert (err.count("error:"), "Traceback" in err, Path("out").exists()) == (1, False, False)


@pytest.mark.parametrize("command", ["fit", "prune"])
def test_help_lists_the_flags_of_every_kind(command, capsys):
    assert main([command, "--help-all"]) == 0
    shown = capsys.readouterr().out
    for flag in (
        "pruning_ratio",
        "mlp_ratio",
        "importance.criterion",
        "method",
        "sparsity",
        "update",
        "sparse.offload",
    ):
        assert f"--{flag}" in shown
    assert "--lora_prune.every" in shown


def test_the_printed_configuration_runs_again(capsys, monkeypatch):
    unchecked(monkeypatch)
    with pytest.raises(SystemExit):
        main(["fit", *SPARSE, "--model.path=m", "--output_dir=out", "--print_config"])
    Path("again.yaml").write_text(capsys.readouterr().out)
    text = Path("again.yaml").read_text()
    assert "lora_prune:" in text


# ---- classes of the user ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_project.Mine", None),
        ("my_project.Mein", "my_project.Mein: there is no such class"),
        ("my_broken.Mine", "'my_broken' cannot be imported: No module named 'nowhere_at_all'"),
        ("my_syntax.Mine", "'my_syntax' cannot be imported: SyntaxError"),
        ("my_none.Mine", "there is no module 'my_none' in the current folder or among the installed packages"),
    ],
)
@pytest.mark.parametrize("given", ["{path}", "{{class_path: {path}}}"])
def test_classes_in_the_current_folder(path, message, given, dense, capsys):
    Path("my_project.py").write_text("from hfprune.criteria import Magnitude\n\n\nclass Mine(Magnitude):\n    pass\n")
    Path("my_broken.py").write_text("import nowhere_at_all\n")
    Path("my_syntax.py").write_text("def f(:\n")
    before = list(sys.path), set(sys.modules)
    flags = [*RATIO, f"--importance.criterion={given.format(path=path)}", "--importance.check_every=0"]
    assert main(["prune", f"--model.path={dense}", "--output_dir=out", *TINY_FLAGS, *flags]) == 2
    assert (message or "--importance.check_every 0 must be positive") in capsys.readouterr().err
    assert sys.path == before[0]
    assert not {"my_project", "my_broken", "my_syntax"} & (set(sys.modules) - before[1])


def test_a_method_that_cannot_be_imported(dense, capsys):
    flags = [f"--model.path={dense}", "--output_dir=out", "--method=my_none.Mine", "--sparsity=0.5"]
    assert main(["prune", *flags]) == 2
    assert "--method my_none.Mine: there is no module 'my_none'" in capsys.readouterr().err


# ---- the process -----------------------------------------------------------------------------------------------------


def test_a_command_leaves_the_process_as_it_was(dense, monkeypatch):
    names = ("hfprune", "lightning.pytorch", "lightning.fabric")
    state = [(logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in names]
    before = warnings.formatwarning, list(warnings.filters), state
    assert main(["prune", f"--model.path={dense}", "--output_dir=out", *RATIO, "--importance.check_every=0"]) == 2
    state = [(logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in names]
    assert (warnings.formatwarning, list(warnings.filters), state) == before


def test_import_adds_no_handler_and_the_module_runs():
    code = (
        "import logging, warnings; before = warnings.formatwarning\n"
        "import hfprune; hfprune.Budget\n"
        "assert not logging.getLogger('hfprune').handlers and not logging.root.handlers\n"
        "assert warnings.formatwarning is before\n"
        "import runpy, sys; sys.argv = ['hfprune', '--version']\n"
        "runpy.run_module('hfprune', run_name='__main__')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout[:1].isdigit()) == (0, True), done.stderr
