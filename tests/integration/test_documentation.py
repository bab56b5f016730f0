"""What pages state of flags, YAML files and the files of a run is what the commands take and write."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from hfprune.cli import main
from hfprune.cli.launch import CLASSES
from hfprune.io.save import load_importance
from hfprune.plan import PruningPlan
from tests.helpers.models import save_tiny
from tests.helpers.published import resolved, unchecked

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def keys_of(table, text):
    """Returns the names in the first column of the table whose head's first cell is ``table``."""
    rows = text.split(f"\n| {table} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


# ---- flags and YAML ----------------------------------------------------------------------------------------------------


def sections():
    """Yields command and flags of the sections ``Flags of ...`` of the page on the command line."""
    for title, body in re.findall(r"^## Flags of (.+?)$(.*?)(?=^## |\Z)", page("cli.md"), re.M | re.S):
        flags = {flag for row in re.findall(r"^\| (`--[^|]+)\|", body, re.M) for flag in re.findall(r"--[\w.]+", row)}
        for command in re.findall(r"`(\w+)`", title):
            yield pytest.param(command, flags, id=f"{command}-{len(flags)}")


@pytest.mark.parametrize(("command", "flags"), list(sections()))
def test_flags_of_the_page_are_in_the_help(command, flags, capsys):
    with contextlib.suppress(SystemExit):
        main([command, "--help-all"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    nested = {flag for flag in flags if flag.rpartition(".")[0] in known}  # an option of a class: --GROUP.CLASS.OPTION
    assert flags
    assert not flags - known - nested


def yaml_blocks():
    for path in sorted(DOCS.glob("*.md")):
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.S)):
            yield pytest.param(path, block, id=f"{path.name}-{number}")


@pytest.mark.parametrize(("path", "block"), list(yaml_blocks()))
def test_yaml_blocks_are_resolved(path, block, tmp_path, monkeypatch):
    """With the first Python block of a page that has a project of its own as ``my_project.py``."""
    monkeypatch.chdir(tmp_path)
    unchecked(monkeypatch)
    if "my_project" in block:
        save_tiny(tmp_path / "my-model")
        code = re.search(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
        (tmp_path / "my_project.py").write_text(code[1])
        monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "block.yaml").write_text(block)
    command = "sweep" if "methods" in yaml.safe_load(block) else "prune"
    flags = ["--config=block.yaml", "--model.path=m", "--data.calibration=c.txt", "--output_dir=out"]
    flags += ["--texts={w: w.txt}"] if command == "sweep" else []
    cli = CLASSES[command](command, flags)
    if command == "prune":
        resolved(cli, "smollm2-135m", layout=False)


# ---- files of a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=2", "--data.eval_window=16"]
    flags += ["--data.calibration=builtin", "--pruning_ratio=0.2", f"--output_dir={folder / 'out'}"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["prune", f"--model.path={save_tiny(folder / 'dense')}", *flags]) == 0
    return folder / "out"


def test_the_plan_has_the_documented_keys(run):
    plan = json.loads((run / "plan.json").read_text())
    assert set(plan) == keys_of("key", page("files.md").split("## plan.json")[1])
    assert set(plan["groups"][0]) == keys_of("key of `groups[i]`", page("files.md"))
    assert set(plan["provenance"]) == keys_of("key of `provenance`", page("files.md"))
    assert PruningPlan.load(run / "model").widths() == PruningPlan.load(run).widths()


def test_the_report_has_the_documented_keys(run):
    report = json.loads((run / "report.json").read_text())
    assert set(report) == keys_of("key", page("files.md").split("## report.json")[1])
    documented = keys_of("key of `stages.NAME`", page("files.md"))
    for stage in report["stages"].values():
        assert documented - set(stage) == {"optimizer_steps", "supervised_tokens", "training"}
        assert not set(stage) - documented


def test_importance_has_one_tensor_of_each_group(run):
    plan, scores = PruningPlan.load(run), load_importance(run)
    assert {name: tuple(tensor.shape) for name, tensor in scores.items()} == {
        g.name: (g.num_units,) for g in plan.groups
    }
    assert {str(tensor.dtype) for tensor in scores.values()} == {"torch.float64"}
    assert AutoConfig.from_pretrained(run / "model").intermediate_size == plan.config["intermediate_size"]
