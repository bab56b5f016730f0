"""The cache of proofs."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune.models import proof_cache
from hfprune.models.architectures import LLAMA
from hfprune.models.proof import CLAIMS, Claim, Proof
from hfprune.models.proof_cache import cache_folder, proof_of
from hfprune.utils.errors import UnsupportedArchitectureError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(proof_cache, "_KNOWN", {})
    return tmp_path / "proofs"


@pytest.fixture(autouse=True)
def _known_proof(monkeypatch):
    """Each test needs a proof, none the time that it takes."""
    monkeypatch.setattr(proof_cache, "prove", lambda spec, tiny: Proof(spec=spec, claims=CLAIMED, stated={"mlp": ""}))


CLAIMED = {name: Claim(proven=name != "experts", reason="" if name != "experts" else "none") for name in CLAIMS}


def proof(describe, **switches):
    return proof_of(LlamaForCausalLM, LlamaConfig(num_hidden_layers=2, **switches), describe)


class Describe:
    """Counts how often a class is described."""

    def __init__(self):
        self.count = 0

    def __call__(self, tiny):
        self.count += 1
        assert not next(tiny.parameters()).is_meta
        return LLAMA


def test_a_class_is_proven_once_and_read_from_disk_later(folder, monkeypatch):
    describe = Describe()
    first = proof(describe)
    assert proof(describe, hidden_size=64) is first  # sizes do not matter
    assert (describe.count, first.verdict) == (1, "proven")
    monkeypatch.setattr(proof_cache, "_KNOWN", {})
    again = proof(describe)
    assert (describe.count, again, again.spec) == (1, first, LLAMA)
    assert len(list(folder.iterdir())) == 1
    proof(describe, mlp_bias=True)  # a switch
    assert describe.count == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 1, "proof": {"spec": 3}}', "null"])
def test_a_damaged_file_is_made_again(folder, monkeypatch, damage):
    describe = Describe()
    first = proof(describe)
    (file,) = folder.iterdir()
    text = file.read_text()
    file.write_text(damage)
    monkeypatch.setattr(proof_cache, "_KNOWN", {})
    assert proof(describe) == first
    assert (describe.count, file.read_text()) == (2, text)


def test_a_value_of_another_type_is_made_again(folder, monkeypatch):
    proof(Describe())
    (file,) = folder.iterdir()
    data = json.loads(file.read_text())
    data["proof"]["spec"]["packing"] = "sometimes"
    file.write_text(json.dumps(data))
    monkeypatch.setattr(proof_cache, "_KNOWN", {})
    again = Describe()
    assert proof(again).spec.packing == "positions"
    assert again.count == 1


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "file"))
    assert proof(Describe()).verdict == "proven"


def test_a_refusal_is_kept_in_the_process_only(folder, monkeypatch):
    count = []

    def describe(tiny):
        count.append(1)
        raise UnsupportedArchitectureError("It has no layers.")

    for _ in range(2):
        with pytest.raises(UnsupportedArchitectureError, match="It has no layers"):
            proof(describe)
    assert len(count) == 1
    assert not folder.exists()


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("HFPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/hfprune/proofs"


def grown(scale):
    """Returns a class that is defined in a function, as cells of a notebook do it again and again."""

    class Grown(LlamaForCausalLM):
        factor = scale

    return Grown


def test_class_that_is_defined_again_is_proven_again(folder):
    """The file, the name and the config are the same; only the class is another."""
    describe = Describe()
    for scale in (1, 2):
        proof_of(grown(scale), LlamaConfig(num_hidden_layers=2), describe)
    assert describe.count == 2
    assert not folder.exists()


def test_files_of_the_modules_of_a_class_are_part_of_the_key(tmp_path, monkeypatch):
    """The class imports its layers from another file, which changes."""
    for name, text in (
        ("its_layers", "from torch import nn\n\nclass Odd(nn.Identity): pass\n"),
        (
            "its_model",
            "from its_layers import Odd\nfrom transformers import LlamaForCausalLM\n\n"
            "class OddLM(LlamaForCausalLM):\n    def __init__(self, config):\n"
            "        super().__init__(config)\n        self.odd = Odd()\n",
        ),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    from its_model import OddLM

    keys = [proof_cache._key(OddLM, LlamaConfig(), "derived")]
    with (tmp_path / "its_layers.py").open("a") as file:
        file.write("# changed\n")
    keys.append(proof_cache._key(OddLM, LlamaConfig(), "derived"))
    assert keys[0] != keys[1]
