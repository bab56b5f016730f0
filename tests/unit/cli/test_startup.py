"""What each command imports, and how."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfprune
from hfprune.cli.startup import importing

HEAVY = ("torch", "transformers", "lightning", "peft", "torchmetrics", "datasets", "matplotlib", "rich", "scipy.signal")


def imported(code, *args, cwd=None):
    """Returns the heavy packages that a new process has imported after ``code``."""
    code = f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


def command(*args, cwd=None):
    return imported("from hfprune.cli import main\nassert main(sys.argv[1:]) == 0", *args, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("module", ["hfprune", "hfprune.cli", "hfprune.publishing.card", "hfprune.cli.plan"])
def test_modules_that_need_no_heavy_package_import_none(module):
    assert imported(f"import {module}") == set()


def test_inspect_and_card_import_no_heavy_package(folder, tmp_path):
    model = hfprune.load(folder)
    plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(8) for i in range(2)})
    hfprune.apply_plan(model, plan)
    hfprune.save(model, tmp_path / "pruned", plan=plan)
    assert command("inspect", str(tmp_path / "pruned")) == set()
    assert command("card", "--help") == set()


def test_plan_imports_what_describes_a_model_and_nothing_that_trains_or_draws(folder):
    assert command("plan", folder) == {"torch", "transformers"}


def test_imports_that_are_paused_for_run_without_collections():
    code = (
        "import gc, hfprune.cli.startup as startup\n"
        "runs = []\n"
        "gc.callbacks.append(lambda phase, info: runs.append(phase))\n"
        "with startup.importing():\n"
        "    import sympy\n"
        "assert not runs and gc.isenabled() and gc.get_freeze_count() > 10_000, (runs, gc.get_freeze_count())"
    )
    assert imported(code) == set()


def test_a_failing_import_leaves_the_collector_as_it_was():
    code = (
        "import gc, hfprune.cli.startup as startup\n"
        "try:\n"
        "    with startup.importing():\n"
        "        assert not gc.isenabled()\n"
        "        import there_is_no_such_module\n"
        "except ImportError:\n"
        "    assert gc.isenabled()\n"
        "else:\n"
        "    raise AssertionError"
    )
    assert imported(code) == set()


def test_a_process_with_torch_keeps_its_collector():
    frozen = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
