"""Publishing: what runs wrote goes to a hub on this machine with the real client library, and is used from there."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from huggingface_hub import ModelCard

from hfprune.cli import main
from tests.helpers.fake_hub import fake_hub
from tests.helpers.models import save_tiny
from tests.helpers.runs import TINY_FLAGS

SCRIPT = """
import json, sys
import torch
import hfprune
from hfprune.cli import main
from hfprune.publishing.inspection import inspect_folder
from hfprune.utils.errors import ConfigError
from peft import AutoPeftModelForCausalLM

root, found = sys.argv[1], {}
ids = torch.arange(16)[None]
base, refit, tuned = f"{root}/base", f"{root}/refit", f"{root}/tuned"
found["model"] = main(["push", refit, "me/small", "--private", "--license", "mit"])
found["plan"] = main(["push", refit, "me/plan", "--what", "plan"])
found["pruned"] = hfprune.push(tuned, "me/pruned")
found["again"] = hfprune.push(tuned, "me/pruned")
found["adapter"] = main(["push", tuned, "me/adapter", "--what", "adapter", "--base_model", "me/pruned"])
expected = hfprune.load(f"{refit}/model")(ids).logits
found["model equal"] = torch.equal(expected, hfprune.load("me/small")(ids).logits)
found["plan equal"] = torch.equal(expected, hfprune.load(base, plan="me/plan")(ids).logits)
found["not dense"] = not torch.equal(expected, hfprune.load(base)(ids).logits)
adapted = AutoPeftModelForCausalLM.from_pretrained("me/adapter").eval()
found["adapter equal"] = torch.equal(adapted(input_ids=ids).logits, hfprune.load(f"{tuned}/adapter")(ids).logits)
found["inspect"] = {key: inspect_folder("me/plan")[key] for key in ("layout", "path")}
found["none"] = main(["inspect", "me/none"])
try:
    hfprune.load(base, plan="me/none")
except ConfigError as error:
    found["no plan"] = str(error)
try:
    hfprune.push(refit, "me/other", token="hf_wrong")
except ConfigError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense model with a card, a run with refitted weights, and one whose adapters were not merged."""
    root = tmp_path_factory.mktemp("runs")
    base = save_tiny(root / "base")
    (root / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    flags = ["--model.path", base, "--pruning_ratio=0.1", *TINY_FLAGS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
        assert main(["prune", *flags, "--output_dir", f"{root}/refit", "--importance.compensation=LeastSquares"]) == 0
        recovery = ["--data.recovery=builtin", "--data.recovery_sequences=4", "--trainer.max_epochs=1"]
        assert main(["fit", *flags, *recovery, "--merge_adapters=false", "--output_dir", f"{root}/tuned"]) == 0
    return root


@pytest.fixture(scope="module")
def published(runs):
    """The hub after everything was published, and what the script found there."""
    with fake_hub() as hub:
        env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token, "HF_HOME": f"{runs}/home"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(runs)],
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return hub, json.loads(done.stdout.splitlines()[-1]), done


def test_a_model_a_plan_and_an_adapter_work_from_the_hub(published):
    hub, found, done = published
    assert found["model"] == found["plan"] == found["adapter"] == 0, done.stderr
    assert found["pruned"] == found["again"] == f"{hub.address}/me/pruned"
    assert found["model equal"]
    assert found["plan equal"]
    assert found["adapter equal"]
    assert found["not dense"]


def test_the_repositories_hold_what_is_needed_and_no_more(published):
    hub, _, _ = published
    assert hub.private == {"me/small": True, "me/plan": False, "me/pruned": False, "me/adapter": False}
    assert set(hub.repos["me/plan"]) == {"README.md", "plan.json", "rebuild.json", "refit.safetensors"}
    assert set(hub.repos["me/adapter"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {"README.md", "config.json", "model.safetensors", "plan.json", "tokenizer.json"} <= set(
        hub.repos["me/small"]
    )
    assert len(hub.repos["me/plan"]["refit.safetensors"]) < len(hub.repos["me/small"]["model.safetensors"]) / 4
    assert json.loads(hub.repos["me/adapter"]["adapter_config.json"])["base_model_name_or_path"] == "me/pruned"
    assert json.loads(hub.repos["me/plan"]["rebuild.json"])["base_model"] == "base"  # no place on this machine


def test_the_cards_are_read_by_the_client_library(published):
    hub, _, _ = published
    cards = {repo: ModelCard(files["README.md"].decode()) for repo, files in hub.repos.items()}
    assert cards["me/small"].data.license == "mit"
    assert cards["me/plan"].data.license == "apache-2.0"  # of the base's card
    assert cards["me/adapter"].data.base_model == "me/pruned"
    assert cards["me/adapter"].data.to_dict()["base_model_relation"] == "adapter"
    assert "hfprune.load" in cards["me/plan"].text
    assert "pruning-plan" in cards["me/plan"].data.tags


def test_figures_of_the_card_are_those_of_the_published_model(published, runs):
    hub, _, _ = published
    stages = json.loads((runs / "tuned/report.json").read_text())["stages"]
    for repo, stage in (("me/pruned", "pruned"), ("me/adapter", "recovered")):
        results = ModelCard(hub.repos[repo]["README.md"].decode()).data.eval_results
        measured = {result.metric_type: result.metric_value for result in results}
        assert measured["perplexity"] == pytest.approx(stages[stage]["perplexity"]["value"])
        assert measured["kl_divergence"] == pytest.approx(stages[stage]["fidelity"]["kl"])


def test_errors_of_the_hub_are_one_line(published):
    _, found, done = published
    assert found["none"] == 2
    assert found["no plan"].startswith(
        "plan='me/none': no such file or folder, and the hub gave none: there is no such"
    )
    assert "cannot be written: Invalid username or password. Run 'hf auth login'" in found["refused"]
    assert "Traceback" not in done.stderr


def test_a_hub_id_is_inspected_under_its_own_name(published):
    _, found, _ = published
    assert found["inspect"] == {"layout": "plan", "path": "me/plan"}
