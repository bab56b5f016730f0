"""What setup.cfg, the Makefile, the workflow and the hooks say of each other."""

import configparser
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def requirements():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].strip().splitlines()
    return dict(re.match(r"([\w-]+(?:\[\w+\])?)\s*(.*)", line).groups() for line in lines)


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {package.lower().replace("_", "-"): version for package, version in (line.split("==") for line in lines)}


def targets():
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))


def commands(node):
    if isinstance(node, dict):
        return [c for key, value in node.items() for c in ([value] if key == "run" else commands(value))]
    return [c for value in node for c in commands(value)] if isinstance(node, list) else []


def test_the_lowest_constraints_are_the_lower_bounds():
    bounds = {name.partition("[")[0]: re.search(r">=([\d.]+)", text)[1] for name, text in requirements().items()}
    lowest = pins("constraints-lowest.txt")
    assert lowest.keys() == bounds.keys()
    for name, version in lowest.items():
        assert version == bounds[name] or version in {f"{bounds[name]}.0", f"{bounds[name]}.0.0"}


def test_the_tested_versions_are_within_the_ranges():
    from packaging.specifiers import SpecifierSet

    tested = pins("constraints.txt")
    for name, text in requirements().items():
        assert tested[name.partition("[")[0]] in SpecifierSet(text)


def test_metadata_is_in_setup_cfg_alone():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text()).keys() == {"build-system", "tool"}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"].keys() == {"ruff"}


def test_the_workflow_runs_targets_of_the_makefile():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    named = {*matrix["target"], *(more["target"] for more in matrix["include"])}
    run = [command for command in commands(workflow) if "${{" not in command]
    assert all(command.startswith("make ") for command in run)
    assert {command.split()[1] for command in run} | named <= targets()
    assert {"check", "links", "wheel"} <= {command.split()[1] for command in run}


def test_the_workflow_covers_the_versions_that_are_claimed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    claimed = set(re.findall(r"Python :: (\d\.\d+)", config["metadata"]["classifiers"]))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == claimed


@pytest.mark.parametrize(("repository", "package"), [("ruff-pre-commit", "ruff"), ("codespell", "codespell")])
def test_hooks_have_the_versions_of_the_environment(repository, package):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (found,) = [hook["rev"] for hook in hooks if hook["repo"].endswith(f"/{repository}")]
    assert found == f"v{pins('constraints.txt')[package]}"


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert citation["license"] == config["metadata"]["license"]
    assert [author["name"] for author in citation["authors"]] == [config["metadata"]["author"]]
