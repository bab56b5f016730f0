"""``per_layer`` folders in transformers without hfprune, by remote code."""

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

import hfprune
from hfprune.io.layouts.remote_code import MODULE, add_remote_code
from tests.helpers.models import GATED
from tests.helpers.served import PROMPTS, SMALL, cut, difference, read, run_script, small

OLD = [path for path in os.environ.get("HFPRUNE_TRANSFORMERS4", "").split(os.pathsep) if path]
_READ = """
import json, sys
sys.modules["hfprune"] = None  # an import of it raises ImportError
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
folders, prompts, again, options = json.loads(sys.argv[1])
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
    model.generation_config.eos_token_id = None
    logits, tokens = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits[0, -1].tolist())
            made = model.generate(ids, max_new_tokens=8, do_sample=False)
        tokens.append(made[0, len(prompt):].tolist())
    found[folder] = [logits, tokens]
if again:
    model.save_pretrained(again)
    same = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    pairs = zip(model.state_dict().items(), same.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(input_ids=ids).last_hidden_state
    assert torch.isfinite(hidden).all()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("the code ran without trust_remote_code")
print(json.dumps({"version": transformers.__version__, "found": found}))
"""


FEW = ("gemma3_all", "gpt2_heads", "gpt_neox_widths", "llama_all", "mixtral_experts", "phi3_heads")
"""A family for each way in which a layer is built; the slow tests take all of ``SMALL``."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Name -> export of a few families."""
    root = tmp_path_factory.mktemp("exports")
    return {name: small(name, root / name) for name in FEW}


@pytest.fixture(scope="module")
def every_export(exports, tmp_path_factory):
    """Name -> export of every family, with every kind of unit that may differ between layers."""
    root = tmp_path_factory.mktemp("others")
    return exports | {name: small(name, root / name) for name in SMALL if name not in FEW}


def compared(exports, answer):
    """Asserts that an answer of ``_READ`` has the tokens and logits of the exports."""
    wrong = {}
    for name, export in exports.items():
        logits, tokens = answer["found"][str(export.folder)]
        if tokens != export.tokens or difference(logits, export.logits) > 1e-5:
            wrong[name] = difference(logits, export.logits)
    assert wrong == {}


def answer(exports, again="", *, options=None, path=""):
    folders = [str(export.folder) for export in exports.values()]
    return run_script(sys.executable, _READ, [folders, PROMPTS, str(again), options or {}], path=path)


def test_a_few_families_without_hfprune(exports, tmp_path):
    compared(exports, answer(exports, tmp_path / "again"))


@pytest.mark.slow
def test_every_family_without_hfprune(every_export, tmp_path):
    compared(every_export, answer(every_export, tmp_path / "again"))


@pytest.mark.slow
@pytest.mark.skipif(not OLD, reason="HFPRUNE_TRANSFORMERS4 names no transformers 4: make test-transformers4")
@pytest.mark.parametrize("path", OLD[-1:] or ["none"], ids=lambda path: Path(path).name)
def test_every_family_in_transformers_4(path, every_export):
    """The newest release that is installed."""
    found = answer(every_export, options={"attn_implementation": "eager"}, path=path)
    assert found["version"] == Path(path).name
    compared(every_export, found)


def test_the_code_is_one_file_that_imports_torch_and_transformers_alone(exports):
    for export in exports.values():
        text = (export.folder / f"{MODULE}.py").read_text()
        imports = [line for line in text.splitlines() if line.startswith(("import", "from"))]
        assert {line.split()[1] for line in imports} == {"torch", "transformers"}
        compile(text, MODULE, "exec")


def test_hfprune_ignores_the_code_and_does_not_carry_its_name_on(exports, tmp_path):
    import hfprune.auto

    export = exports["llama_all"]
    (export.folder / f"{MODULE}.py").write_text("raise AssertionError('this code must not run')")
    for model in (hfprune.load(export.folder), AutoModelForCausalLM.from_pretrained(export.folder)):
        assert type(model).__module__ == "transformers.models.llama.modeling_llama"
        model.save_pretrained(tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert read(tmp_path).tokens == export.tokens


def test_values_of_removed_layers_are_renumbered(exports):
    data = json.loads((exports["llama_all"].folder / "config.json").read_text())
    assert data["num_hidden_layers"] == 2
    assert {k: v["intermediate_size"] for k, v in data["per_layer_config"].items()} == {"0": 11, "1": 18}
    assert data["per_layer_config"]["0"]["num_key_value_heads"] == 1


def test_a_folder_without_values_after_removed_layers_still_loads(exports, tmp_path):
    """As exports of earlier versions are."""
    folder = exports["gemma3_all"].folder
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "config.json").read_text())
    del data["per_layer_config"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert read(tmp_path).tokens == exports["gemma3_all"].tokens


def test_no_code_where_it_would_build_other_shapes(exports, tmp_path):
    """A config.json that does not state all sizes: the folder stays as it was."""
    export = exports["llama_all"]
    model = hfprune.load(export.folder)
    data = json.loads((export.folder / "config.json").read_text())
    del data["per_layer_config"]["1"], data["auto_map"]
    before = json.dumps(data)
    (tmp_path / "config.json").write_text(before)
    assert "model.layers.1.mlp" in add_remote_code(tmp_path, model)
    assert (tmp_path / "config.json").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_stock_folders_have_no_code(tmp_path):
    for layout in ("uniform", "padded"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**GATED))
        plan = cut(model, widths=(8, 8, 8) if layout == "uniform" else (8, 8, 9))
        hfprune.io.save.export_model(model, None, plan, tmp_path / layout, layout=layout)
        assert not list((tmp_path / layout).glob("*.py"))
