"""Examples and README blocks run."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from hfprune.cli import COMMANDS
from tests.models import save_tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_drop_in_example(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "dense")
    monkeypatch.setattr("sys.argv", ["drop_in.py", folder, str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples/drop_in.py"), run_name="__main__")
    assert (tmp_path / "out/model/model.safetensors").is_file()


def documented_commands():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("hfprune "):
                    yield path.name, line.partition(" #")[0]


@pytest.mark.parametrize(("page", "line"), list(documented_commands()))
def test_documented_commands_parse(page, line, monkeypatch):
    from hfprune.launch import EvaluateCLI, RunCLI

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("hfprune.modules.causal_lm.check_model_path", lambda path: None)
    monkeypatch.setattr("hfprune.data.text.check_source", lambda source, flag: None)
    monkeypatch.setattr("hfprune.callbacks.report.check_output_dir", lambda *a, **k: None)
    _, command, *flags = shlex.split(line)
    assert command in COMMANDS
    (EvaluateCLI if command == "evaluate" else RunCLI)(command, flags)


def test_readme_python_block_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-model")
    small = "TextDataModule(seq_len=16, calibration_sequences=4, recovery_sequences=4, eval_window=16, eval_windows=2"
    exec(compile(block.replace("TextDataModule(", small + ", "), "README.md", "exec"), {})
    assert (tmp_path / "pruned/model/config.json").is_file()
