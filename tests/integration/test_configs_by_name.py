"""Configs by name: in the checkout, and in a wheel that is installed elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.cli.config_files import config_path, shipped_configs, with_config_paths
from hfprune.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("empty_folder")

ROOT = Path(__file__).resolve().parents[2]


def test_every_config_of_the_checkout_has_a_name():
    found = shipped_configs()
    assert set(found.values()) == set((ROOT / "configs").rglob("*.yaml"))
    assert found["methods/fisher"] == ROOT / "configs/methods/fisher.yaml"


@pytest.mark.parametrize("name", ["methods/fisher", "methods/fisher.yaml", "configs/methods/fisher.yaml"])
def test_names_resolve_from_any_folder(name):
    expected = str(ROOT / "configs/methods/fisher.yaml")
    assert with_config_paths(["--config", name, "--seed=1"]) == ["--config", expected, "--seed=1"]
    assert with_config_paths([f"--config={name}"]) == [f"--config={expected}"]
    assert with_config_paths(["--output_dir", name]) == ["--output_dir", name]


def test_files_of_the_user_take_precedence():
    Path("quickstart").write_text("pruning_ratio: 0.1\n")
    Path("configs").mkdir()
    Path("configs/sweep.yaml").write_text("{}\n")
    assert config_path("quickstart") == "quickstart"
    assert config_path("configs/sweep.yaml") == "configs/sweep.yaml"
    assert config_path("{pruning_ratio: 0.2}") == "{pruning_ratio: 0.2}"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quickstrat", "'quickstart'"),
        ("fisher", "'methods/fisher'"),
        ("methods/wanda.yaml", "'sparse/wanda'"),
        ("sdmprune", "'methods/sdmprune_20'"),
        ("nothing_like_it", "'hfprune --help' lists them"),
        ("", "'hfprune --help' lists them"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name, near, capsys):
    with pytest.raises(ConfigError, match="does not exist, and no config of the package has this name") as refusal:
        config_path(name)
    assert near in str(refusal.value)
    assert main(["fit", f"--config={name}", "--output_dir=out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert near in line
    assert not Path("out").exists()


def test_help_lists_the_names(capsys):
    assert main(["--help"]) == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(shipped_configs()) <= set(words)


def test_a_config_by_name_is_parsed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--print_config"])
    assert end.value.code == 0
    assert "output_dir: outputs/quickstart" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_has_the_configs(tmp_path):
    """Built from a copy of the sources, so that no build folder stays in the checkout."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "hfprune", source / "hfprune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "-w", str(tmp_path / "dist"), str(source)], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    shipped = {path.relative_to(site / "hfprune/configs") for path in (site / "hfprune/configs").rglob("*.yaml")}
    assert shipped == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    environment = {**os.environ, "PYTHONPATH": str(site)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for command in (["fit", "--config", "quickstart"], ["prune", "--config=methods/fisher"]):
        run = [sys.executable, "-P", str(site / "bin/hfprune"), *command, "--print_config"]
        done = subprocess.run(run, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pruning_ratio: 0.2" in done.stdout
    code = "import hfprune; print(hfprune.__file__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(site))
