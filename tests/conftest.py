"""Shared fixtures. No test touches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The default tests draw the same examples in every run; `make test-slow` draws new ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("random", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

if "HFPRUNE_CACHE" not in os.environ:  # proofs of classes are shared by the tests of a run, and never by two runs
    _CACHE = tempfile.TemporaryDirectory(prefix="hfprune-tests-")
    os.environ["HFPRUNE_CACHE"] = _CACHE.name

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _global_state():
    """Every test starts from the same seed and leaves torch's global settings as it found them."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # the command line sets them; DDP seeds itself anew from them
        os.environ.pop(name, None)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a tiny Llama with random weights."""
    from tests.helpers.models import save_tiny  # imports transformers

    return save_tiny(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Reports with empty images: drawing takes most of the time of a run of a tiny model. Others test what is drawn."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


@pytest.fixture
def shared_dir():
    """The folder of shared data and golden figures beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
