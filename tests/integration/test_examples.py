"""Examples and README blocks run."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM

from hfprune.cli.arguments import understood
from hfprune.cli.config_files import with_config_paths
from hfprune.cli.entry import COMMANDS
from hfprune.cli.simple_commands import SIMPLE_COMMANDS, simple_parser
from hfprune.criteria import ActivationNorm
from hfprune.models import ARCHITECTURES
from tests.helpers.models import save_tiny
from tests.helpers.published import resolved, unchecked

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*exists and is not empty", "ignore:.*no last checkpoint")
@pytest.mark.parametrize("name", ["prune_and_recover", "drop_in", "resume"])
def test_example(name, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", folder, str(tmp_path / "out")])
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    saved = tmp_path / "out" if name == "drop_in" else tmp_path / "out/model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.config.intermediate_size == 14


def test_notebook(tmp_path, monkeypatch, capsys):
    folder = save_tiny(tmp_path / "dense")
    monkeypatch.setattr("sys.argv", ["notebook.py", folder, str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples/notebook.py"), run_name="__main__")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 18
    assert "model.layers.2.mlp: 24 neurons, the top tenth holds" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_process_example(strategy, tmp_path):
    """The one test of processes that Lightning launches: those of other tests are forked by ``tests.helpers.warm``."""
    folder = save_tiny(tmp_path / "dense")
    command = [sys.executable, str(ROOT / "examples/two_processes.py"), folder, str(tmp_path / "out"), strategy]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert (tmp_path / "out/report.json").is_file(), done.stderr[-2000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").config.intermediate_size == 14


def documented_commands():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("hfprune "):
                    yield path.name, line.partition(" #")[0]


@pytest.mark.parametrize(("page", "line"), list(documented_commands()))
def test_documented_commands_are_resolved(page, line, tmp_path, monkeypatch):
    from hfprune.cli.launch import CLASSES

    monkeypatch.chdir(ROOT)
    unchecked(monkeypatch)
    if "run.yaml" in line:  # what the line before it in the page writes
        monkeypatch.chdir(tmp_path)
        Path("run.yaml").write_text("pruning_ratio: 0.2\noutput_dir: OUT\n")
    if "my_project" in line:
        own = ModuleType("my_project")
        own.MyCriterion = type("MyCriterion", (ActivationNorm,), {"__module__": "my_project"})
        monkeypatch.setitem(sys.modules, "my_project", own)
    _, command, *flags = shlex.split(line.partition(" > ")[0])
    assert command in COMMANDS
    if command in SIMPLE_COMMANDS:
        simple_parser(command).parse_args(flags)
        return
    flags = with_config_paths([flag for flag in understood(command, flags) if flag != "--print_config"])
    cli = CLASSES[command](command, flags)
    if command in ("fit", "prune"):
        resolved(cli, "mixtral-4-layers" if "[experts]" in line else "smollm2-135m", layout=False)


def test_scripts_and_flags_in_the_documentation_exist():
    """``python benchmarks/NAME.py --flag`` in a page: the script, and every flag of it."""
    found = 0
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name, flags in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)([^`\n]*)", path.read_text("utf-8")):
            script = (ROOT / name).read_text(encoding="utf-8")
            found += 1
            for flag in re.findall(r"--([a-z_0-9]+)", flags):
                assert f'"--{flag}"' in script or f"{flag}:" in script or f"{flag}=" in script, (path.name, name, flag)
    assert found > 5


def python_blocks():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)):
            yield pytest.param(block, id=f"{path.name}-{number}")


@pytest.fixture
def registered_tables():
    """Removes the architecture tables that a test registers."""
    before = set(ARCHITECTURES)
    yield
    for name in set(ARCHITECTURES) - before:
        ARCHITECTURES.remove(name)


@pytest.mark.usefixtures("registered_tables")
@pytest.mark.filterwarnings("ignore:Starting from v1.9")  # the default logger without tensorboard
@pytest.mark.parametrize("block", list(python_blocks()))
def test_documented_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-model")
    small = "TextDataModule(seq_len=16, calibration_sequences=4, recovery_sequences=4, eval_window=16, eval_windows=2"
    shown = block if "seq_len=" in block else block.replace("TextDataModule(", small + ", ")
    exec(compile(shown, "documentation", "exec"), {})
    assert ("pruned" not in block) or (tmp_path / "pruned/model/config.json").is_file()
