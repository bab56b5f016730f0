"""Seeded damage to a model folder: the run works, or stops with one line before anything is written."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest

from hfprune.cli import main
from tests.helpers.models import save_tiny

SMALL = ["--data.seq_len=16", "--data.calibration_sequences=2", "--data.eval_windows=0", "--latency=false"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--importance.criterion=Magnitude"]
VALUES = [None, -1, 0, 1, 3, 61, 1000, 1.5, -0.5, True, False, "x", "", [], [1, 2], {}, {"a": 1}]
JSON_FILES = ["config.json", "config.json", "config.json", "generation_config.json", "tokenizer_config.json"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "dense", "llama_untied_bias")


def damage(folder, rng):
    """Damages one file of ``folder`` and returns what was done."""
    if rng.random() < 0.6:
        return _entry(folder / rng.choice(JSON_FILES), rng)
    file = rng.choice(sorted(path for path in folder.iterdir()))
    return f"{file.name}: {_content(file, rng)}"


def _entry(file, rng):
    data = json.loads(file.read_text())
    key, value = rng.choice(sorted(data)), rng.choice(VALUES)
    if rng.random() < 0.1:
        del data[key]
    else:
        data[key] = value
    file.write_text(json.dumps(data))
    return f"{file.name}: {key} = {data.get(key, 'left out')!r}"


def _content(file, rng):
    old = file.read_bytes()
    start, end = sorted(rng.randrange(len(old) + 1) for _ in range(2))
    changes = {
        "cut off": old[:start],
        "zeros": bytes(len(old)),
        "zeros within": old[:start] + bytes(end - start) + old[end:],
        "part missing": old[:start] + old[end:],
        "pointer": POINTER,
        "list": b"[1, 2]",
        "null": b"null",
        "noise": rng.randbytes(200),
        "empty": b"",
    }
    name = rng.choice(["deleted", "folder", *changes])
    file.unlink()
    if name == "folder":
        file.mkdir()
    elif name != "deleted":
        file.write_bytes(changes[name])
    return name


def check(dense, seeds, capsys):
    """Prunes damaged copies of ``dense``, one a seed, and returns the outcomes that are neither."""
    wrong, codes = [], []
    for seed in seeds:
        folder, out = Path(shutil.copytree(dense, f"m{seed}")), Path(f"out{seed}")
        done = damage(folder, random.Random(seed))
        capsys.readouterr()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = main(["prune", f"--model.path={folder}", f"--output_dir={out}", "--pruning_ratio=0.2", *SMALL])
        except Exception as error:  # a traceback for the user
            wrong.append(f"seed {seed}, {done}: {type(error).__name__} {str(error)[:200]}")
            continue
        err = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        codes.append(code)
        if code == 2 and (len(err) != 1 or out.exists()):
            wrong.append(f"seed {seed}, {done}: {len(err)} lines, output {out.exists()}: {err[:3]}")
        elif code not in (0, 2) or (code == 0 and not (out / "model/model.safetensors").is_file()):
            wrong.append(f"seed {seed}, {done}: exit code {code}")
        shutil.rmtree(folder)
    return wrong, codes


@pytest.mark.parametrize("part", range(4))
def test_damage_is_refused_in_one_line(dense, tmp_path, monkeypatch, capsys, part):
    monkeypatch.chdir(tmp_path)
    wrong, codes = check(dense, range(part * 12, part * 12 + 12), capsys)
    assert not wrong, "\n".join(wrong)
    assert {0, 2} == set(codes)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_more_damage_is_refused_in_one_line(dense, tmp_path, monkeypatch, capsys, part):
    monkeypatch.chdir(tmp_path)
    wrong, _ = check(dense, range(1000 + part * 60, 1000 + part * 60 + 60), capsys)
    assert not wrong, "\n".join(wrong)
