"""Versions in plans and reports; planning where lightning is not installed."""

import subprocess
import sys
from importlib import metadata

import pytest

from hfprune.utils import versions as room
from hfprune.version import __version__

WITHOUT_LIGHTNING = """
import sys
from importlib import metadata

NAMES = ("lightning", "pytorch_lightning", "lightning_fabric")


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


found = metadata.distribution


def distribution(name):
    if name == "lightning":
        raise metadata.PackageNotFoundError(name)
    return found(name)


sys.meta_path.insert(0, Blocked())
metadata.distribution = distribution

import hfprune
from tests.helpers.models import tiny, token_ids

model = tiny()
plan = hfprune.make_plan(model, hfprune.score(model, [token_ids(2, 8)]), budget=0.2)
print(*sorted(plan.provenance["versions"]))
"""


def test_a_plan_is_made_without_lightning():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIGHTNING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hfprune", "torch", "transformers"]


@pytest.mark.parametrize("missing", ["lightning", "transformers"])
def test_only_installed_packages_have_a_version(missing, monkeypatch):
    version = metadata.version

    def installed(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", installed)
    found = room.versions()
    assert missing not in found
    assert found["hfprune"] == __version__
    assert len(found) == 3
