"""Options of loading in every command: a private repository with a revision and a subfolder, and local subfolders."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.publishing.card import model_card
from tests.helpers.fake_hub import fake_hub
from tests.helpers.models import save_tiny
from tests.helpers.runs import EVALUATE_FLAGS, TINY_FLAGS

SCRIPT = """
import json, sys
import hfprune
import torch
from hfprune.cli import main
from hfprune.io.loading import LoadingOptions
from hfprune.utils.errors import ConfigError

tiny, tiny_evaluate = (words.split() for words in sys.argv[2:4])
out, cache, found = "out", sys.argv[1] + "/cache", {}
place = ["--subfolder", "sub", "--revision", "v1", "--cache_dir", cache, "--token", "hf_right"]
model = ["me/private", *(word.replace("--", "--model.") if word.startswith("--") else word for word in place)]
dense = ["--dense", "me/private", "--dense_revision", "v1", "--dense_subfolder", "sub"]
recovery = ["--data.recovery=builtin", "--data.recovery_sequences=2", "--trainer.max_steps=1"]
more = ["--model.distillation.alpha=0.5", "--model.attn_implementation=eager", "--importance.recovery=full"]
words = ["fit", *model, "--ratio=0.1", "-o", out, *tiny, *recovery, *more]
sys.argv = ["hfprune", *words]
found["fit"] = main(words)
found["again"] = main(["prune", *model, "--ratio=0.1", "-o", "again", *tiny, "--model.local_files_only=true"])
found["evaluate"] = main(["evaluate", out, *dense, *model[5:], *tiny_evaluate, "--output", "evaluation.json"])
found["plan"] = main(["plan", "me/private", *place])
found["inspect"] = main(["inspect", "me/private", *place])
found["chat"] = main(["chat", out, *dense, "--prompt", "a b", "--max_new_tokens", "2", *place[4:]])
loaded = hfprune.load("me/private", subfolder="sub", revision="v1", token="hf_right", cache_dir=cache, dtype="float64")
found["loaded"] = str(loaded.dtype)
found["main"] = main(["plan", "me/private", *place[:2], *place[4:]])
found["wrong"] = main(["plan", "me/private", *place[:4], "--cache_dir", cache + "3", "--token", "hf_wrong"])
for options in ({"token": "hf_wrong"}, {"local_files_only": True, "revision": "v2"}):
    try:
        hfprune.load("me/private", subfolder="sub", cache_dir=cache + "2", **options)
    except ConfigError as error:
        found[str(options)] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A private repository whose model is in a subfolder of a branch, and what the commands made of it."""
    root = tmp_path_factory.mktemp("private")
    save_tiny(root / "model")
    with fake_hub() as hub:
        files = {f"sub/{path.name}": path.read_bytes() for path in (root / "model").iterdir()}
        hub.repos |= {"me/private": {"README.md": b"nothing"}, "me/private@v1": files}
        hub.gated.add("me/private")
        env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": f"{root}/home", "HF_TOKEN": ""}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(root), " ".join(TINY_FLAGS), " ".join(EVALUATE_FLAGS)],
            env=os.environ | env,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return root, hub, json.loads(done.stdout.splitlines()[-1]), done


def test_every_command_reads_the_private_repository(private):
    _, _, found, done = private
    codes = {name: found[name] for name in ("fit", "again", "evaluate", "plan", "inspect", "chat")}
    assert set(codes.values()) == {0}, (codes, done.stderr)
    assert found["loaded"] == "torch.float64"


def test_revision_and_options_are_recorded_without_the_token(private):
    root, hub, _, done = private
    report = json.loads((root / "out/report.json").read_text())
    recorded = report["plan"]["model"]
    assert {key: recorded[key] for key in ("path", "revision", "subfolder", "attn_implementation")} == {
        "path": "me/private",
        "revision": "v1",
        "subfolder": "sub",
        "attn_implementation": "eager",
    }
    assert recorded["commit"] == hub.sha("me/private@v1")
    assert report["saved"]["max_logit_difference_after_reload"] == 0  # reloaded with the same attention
    assert "revision v1, commit" in str(model_card(root / "out"))
    assert "--model.token TOKEN" in report["command"]
    assert "token" not in report["config"]["model"]
    assert json.loads((root / "evaluation.json").read_text())["dense_loading"]["revision"] == "v1"
    written = [path for path in root.rglob("*") if path.is_file() and "home" not in path.parts]
    assert len(written) > 20
    assert [path for path in written if b"hf_right" in path.read_bytes()] == []
    assert "hf_right" not in done.stdout + done.stderr


def test_what_cannot_be_read_is_one_line(private):
    _, _, found, done = private
    assert (found["main"], found["wrong"]) == (2, 2)  # no such folder in the main branch; a wrong token
    assert "Traceback" not in done.stderr
    errors = [text for name, text in found.items() if name.startswith("{")]
    assert len(errors) == 2
    assert all("me/private" in text and "\n" not in text for text in errors)


def test_local_subfolders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    save_tiny(Path("models/dense"))
    model = ["--model.path=models", "--model.subfolder=dense"]
    assert main(["prune", *model, "--pruning_ratio=0.1", "-o", "out", *TINY_FLAGS]) == 0
    assert json.loads(Path("out/report.json").read_text())["plan"]["model"]["subfolder"] == "dense"
    shutil.copytree("out/model", "store/pruned")
    exported = ["--model.path=store", "--model.subfolder=pruned", "--layout=padded", "--output_dir=padded"]
    assert main(["export", *exported]) == 0
    assert Path("padded/config.json").is_file()
    capsys.readouterr()
    for flags, message in (
        (["--model.path=models", "--model.subfolder=dens"], "has no folder 'dens' (subfolder). Did you mean"),
        (["--model.path=models", "--model.subfolder=../x"], "must be a folder within"),
        (["--model.path=models/dense", "--model.dtype=float12"], "float12"),
        (["--model.subfolder=x"], "embedded model, which has no"),
        (["--model.path=store", "--model.subfolder=pruned"], "was already pruned"),
    ):
        assert main(["prune", *flags, "--pruning_ratio=0.1", "-o", "other", *TINY_FLAGS]) == 2
        err = capsys.readouterr().err
        assert (message in err, err.count("error:"), Path("other").exists()) == (True, 1, False), err
    assert main(["evaluate", "out", "--dense_subfolder=x", *EVALUATE_FLAGS]) == 2
    assert "belong to --dense" in capsys.readouterr().err
