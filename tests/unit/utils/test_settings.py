"""Discovery of classes, and settings from constructors."""

import sys

import pytest

from hfprune import allocation, criteria
from hfprune.allocation import Allocation
from hfprune.criteria import CRITERIA, Criterion, Magnitude, WandaStructured, check_experts
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import discover


def test_a_new_file_is_all_that_a_criterion_needs(tmp_path, monkeypatch):
    package = tmp_path / "found_criteria"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "squares.py").write_text(
        "from hfprune.criteria import Magnitude, WeightCriterion\n\n\n"
        "class RootSquare(WeightCriterion):\n"
        "    def __init__(self, power=2.0):\n        self.power = power\n\n"
        "    def score(self, group, weights):\n        return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found = discover("found_criteria", Criterion)
        assert list(found) == ["RootSquare"]
        assert found["RootSquare"]().describe() == {"name": "root_square", "power": "2.0"}
    finally:
        for name in [name for name in sys.modules if name.startswith("found_criteria")]:
            del sys.modules[name]


def test_packages_export_what_their_files_define():
    for package, base in ((criteria, Criterion), (allocation, Allocation)):
        for name, item in discover(package.__name__, base).items():
            assert getattr(package, name) is item
            assert name in package.__all__
    assert CRITERIA["magnitude"] is Magnitude
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        criteria.Missing  # noqa: B018


def test_the_message_lists_the_criteria_that_score_experts():
    able = sorted(cls.__name__ for cls in CRITERIA.values() if cls.experts)
    with pytest.raises(ConfigError, match=f"Choose one of {', '.join(able)}, or leave"):
        check_experts(WandaStructured(), ("experts",))
