import importlib
import pickle
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest

import hfprune
from hfprune import _moved


def resolved(path):
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@contextmanager
def warned(text):
    """One of the warnings inside says ``text``: a parent package gives one of its own."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    assert any(w.category is DeprecationWarning and text in str(w.message) for w in seen)


@pytest.fixture
def fresh(monkeypatch):
    """No old path is in the cache of modules."""
    for name in [*_moved.MODULES, *_moved.NAMES]:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("old", "new"), [(o, n) for o, n in _moved.MODULES.items() if o not in _moved.NAMES])
def test_an_old_path_is_the_new_module(fresh, old, new):
    with warned(f"{old} is now {new};"):
        assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.parametrize(
    ("old", "name", "new"), [(o, n, p) for o, names in _moved.NAMES.items() for n, p in names.items()]
)
def test_an_old_name_is_the_new_object(fresh, old, name, new):
    with warned(f"{old}.{name} is now {new};"):
        assert getattr(importlib.import_module(old), name) is resolved(new)


def test_the_evaluation_moved_from_the_trainer():
    from hfprune import trainer
    from hfprune.evaluation.evaluation import Evaluation

    with warned("hfprune.trainer.Evaluation is now hfprune.evaluation.evaluation.Evaluation;"):
        assert trainer.Evaluation is Evaluation
    with pytest.raises(AttributeError, match="has no attribute 'Evaluator'"):
        trainer.Evaluator  # noqa: B018


def test_a_record_of_the_old_tree_is_unpickled(fresh):
    old = b"chfprune.types\nBudget\n."
    with warned("hfprune.types is now hfprune.plan;"):
        assert pickle.loads(old) is hfprune.Budget


def test_a_module_of_a_moved_package_is_not_loaded_twice(fresh):
    with warned("hfprune.arch.forward is now hfprune.models.forward;"):
        assert importlib.import_module("hfprune.arch.forward") is importlib.import_module("hfprune.models.forward")


@pytest.mark.parametrize("path", ["hfprune.nothing", "hfprune.arch.nothing", "hfprune.layerwise.nothing"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unknown_path_stays_unknown(fresh, path):
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module(path)


def test_importing_the_package_loads_nothing():
    code = "import sys, hfprune; assert 'load' in dir(hfprune); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
