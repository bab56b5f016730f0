"""What each layout writes, what it refuses, and who can load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfprune
from hfprune import PruningModule, PruningPlan, ReportCallback, TaylorImportanceCallback
from hfprune.allocation import Explicit, Inventory, allocate, kept_units
from hfprune.cli import main
from hfprune.io.layouts import LAYOUTS, is_per_layer
from hfprune.io.layouts.stock import compose, pad
from hfprune.io.save import check_shards, export_model
from hfprune.models import config_values, find_groups, parameter_count
from hfprune.models.surgery import mask_plan
from hfprune.plan import Budget, Group, Slice
from hfprune.utils.errors import ConfigError
from tests.helpers.models import NAMES, tiny, tiny_tokenizer, token_ids
from tests.helpers.plans import WIDTHS, head_plan, mlp_plan
from tests.helpers.runs import TINY_FLAGS

ROOT = Path(__file__).resolve().parents[4]
FRESH = ("llama", "qwen2", "gpt2", "opt")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def ragged(name="llama", **kwargs):
    model = tiny(name, **{"dtype": torch.float32} | kwargs)
    plan = mlp_plan(model)
    hfprune.apply_plan(model, plan)
    return model, plan


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with NAME/per_layer and NAME/padded of several classes, and what the model in memory generates."""
    root = tmp_path_factory.mktemp("exported")
    said = {}
    for name in FRESH:
        model, plan = ragged(name)
        for layout in ("per_layer", "padded"):
            saved = export_model(model, tiny_tokenizer(), plan, root / name / layout, layout=layout)
            assert saved["parameters_needed"] == parameter_count(model)
            assert (saved["parameters"] > saved["parameters_needed"]) == (layout == "padded")
        tokens = model.generate(token_ids()[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        said[name] = {"tokens": tokens[0].tolist(), "logits": logits(model).tolist()}
    return root, said


SCRIPT = """
import json, sys
root, mode = sys.argv[1:]
if mode == "stock":
    sys.modules["hfprune"] = None  # importing it would fail
else:
    import hfprune.auto
import torch
from transformers import AutoConfig, AutoModelForCausalLM
job = json.load(open(root + "/job.json"))
ids = torch.tensor(job["ids"])
found = {}
def record(key, model):
    tokens = model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        found[key] = {"tokens": tokens[0].tolist(), "logits": model(input_ids=ids).logits.tolist()}
for name in job["names"]:
    folder = f"{root}/{name}/" + ("padded" if mode == "stock" else "per_layer")
    record(f"{name} auto", AutoModelForCausalLM.from_pretrained(folder))
    if mode != "stock":
        record(f"{name} load", hfprune.load(folder))
if mode == "stock":
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        try:
            load(f"{root}/{name}/per_layer", trust_remote_code=False)
        except ValueError as error:
            found.setdefault("refusals", []).append(str(error))
print(json.dumps(found))
"""


@pytest.mark.parametrize("mode", ["hfprune", "stock"])
def test_a_fresh_process_loads_it(exported, mode):
    """With hfprune the layout per_layer, by both ways; where hfprune cannot be imported the layout padded."""
    root, said = exported
    (root / "job.json").write_text(json.dumps({"ids": token_ids().tolist(), "names": FRESH}))
    env = {**os.environ, "PYTHONPATH": "" if mode == "stock" else str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(root), mode], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    refusals = found.pop("refusals", [])
    assert len(refusals) == (2 if mode == "stock" else 0)
    assert all("trust_remote_code=True" in text for text in refusals)
    assert len(found) == len(FRESH) * (1 if mode == "stock" else 2)
    for key, one in found.items():
        expected = said[key.split()[0]]
        assert one["tokens"] == expected["tokens"]
        atol = 1e-5 if mode == "stock" else 0
        torch.testing.assert_close(torch.tensor(one["logits"]), torch.tensor(expected["logits"]), atol=atol, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padded_is_stock_and_gives_the_same_logits(name, tmp_path):
    model, plan = ragged(name, dtype=torch.float64)
    saved = export_model(model, None, plan, tmp_path / "m", layout="padded")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert not is_per_layer(found.config)
    assert {g.num_units for g in find_groups(found)} == {max(WIDTHS)} == {saved["width"]}
    torch.testing.assert_close(logits(found), logits(model), atol=1e-12, rtol=0)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (found, model)]
    assert tied[0] == tied[1]
    assert saved["parameters"] == parameter_count(found)
    zeros = [int((p == 0).sum()) for p in found.parameters()]
    assert sum(zeros) == saved["parameters"] - saved["parameters_needed"]  # no weight of the tiny models is zero


@pytest.mark.parametrize(
    ("name", "head_dim", "keep", "heads"),
    [
        ("llama", 4, ((0,), (1,), (1,)), 2),
        ("llama_mha_relu", 4, ((0, 2), (3,), (1, 2)), 2),
        ("llama_mha_relu", 4, ((0, 1, 2), (3,), (1, 2)), 4),  # three heads do not divide the hidden size
        ("qwen3", 8, ((0,), (0, 1), (1,)), 4),
    ],
)
def test_padded_heads(name, head_dim, keep, heads, tmp_path):
    """Heads of zeros, to the fewest that the config can express; every kept unit of two plans at its place."""
    model, dense = (tiny(name) for _ in range(2))
    hfprune.apply_plan(model, head_plan(model, keep))
    plan = mlp_plan(model)
    hfprune.apply_plan(model, plan)
    export_model(model, None, plan, tmp_path / "m", layout="padded")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert (found.config.num_attention_heads, found.config.head_dim) == (heads, head_dim)
    torch.testing.assert_close(logits(found), logits(model), atol=1e-12, rtol=0)
    mask_plan(dense, head_plan(dense, keep))
    mask_plan(dense, mlp_plan(dense))
    torch.testing.assert_close(logits(found), logits(dense), atol=1e-12, rtol=0)


def test_padded_needs_every_unit_at_its_place():
    """The oracle above sees it when what a projection reads is not where its producers put it."""
    model, _ = ragged(dtype=torch.float64)
    padded = pad(model)
    weight = padded.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=1))
    stock = AutoModelForCausalLM.from_config(padded.config).double().eval()
    stock.load_state_dict(padded.state_dict())
    assert (logits(stock) - logits(model)).abs().max() > 1e-3


def test_padded_bfloat16(tmp_path):
    model, plan = ragged(dtype=torch.bfloat16)
    saved = export_model(model, None, plan, tmp_path / "m", layout="padded")
    assert saved["max_logit_difference_after_reload"] < 0.1


@pytest.mark.parametrize("layout", ["uniform", "per_layer", "padded"])
def test_a_uniform_plan_is_an_ordinary_folder_in_every_layout(layout, tmp_path):
    model = tiny(dtype=torch.float32)
    plan = mlp_plan(model, (8, 8, 8))
    plan = PruningPlan(
        model_class=plan.model_class, groups=plan.groups, keep=plan.keep, config={"intermediate_size": 8}
    )
    hfprune.apply_plan(model, plan)
    saved = export_model(model, None, plan, tmp_path / "m", layout=layout)
    assert (saved["layout"], saved["width"], saved["parameters"]) == (layout, 8, parameter_count(model))
    assert saved["parameters_needed"] == saved["parameters"]
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "llama"


def test_padded_is_as_wide_as_the_layers_that_stayed(tmp_path):
    """A layer that goes as a whole says nothing of widths."""
    model = tiny(dtype=torch.float64)
    groups = find_groups(model, ("mlp", "heads", "layers"))
    allocation = Explicit(mlp=[11, 9, 7], layers=[1])
    found = allocate(Inventory.of(model, groups), Budget(allocated=True), allocation)
    keep = kept_units({g.name: torch.arange(g.num_units) for g in groups}, groups, found)
    config = config_values(model, groups, keep)
    plan = PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config=config)
    hfprune.apply_plan(model, plan)
    export_model(model, None, plan, tmp_path / "m", layout="padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert (stock.config.num_hidden_layers, stock.config.intermediate_size) == (2, 11)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-12, rtol=0)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_uniform_refuses_layers_that_differ(tmp_path):
    model, plan = ragged()
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.gate_proj\.weight would be \[24, 16\], it is \[11, 16\]"):
        export_model(model, None, plan, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_padded_refuses_what_no_zeros_can_stand_for():
    model = tiny(dtype=torch.float32)
    slices = (Slice(module="model.layers.0.mlp.down_proj", side="in"),)
    slices += tuple(Slice(module=f"model.layers.0.mlp.{name}", side="out") for name in ("gate_proj", "up_proj"))
    group = Group(name="model.layers.0.strange", kind="strange", num_units=24, slices=slices)
    plan = PruningPlan(model_class="LlamaForCausalLM", groups=(group,), keep={group.name: tuple(range(9))}, config={})
    hfprune.apply_plan(model, plan)
    with pytest.raises(ConfigError, match="cannot replace removed strange"):
        LAYOUTS.get("padded").check(model)
    with pytest.raises(ConfigError, match="has the same channels as another group of an earlier plan"):
        compose([plan, mlp_plan(tiny())])


def test_layout_names():
    with pytest.raises(ConfigError, match=r"Unknown layout 'paded'\. Did you mean 'padded'\?.*per_layer, uniform"):
        ReportCallback("unused", layout="paded")
    with pytest.raises(ConfigError, match=r"ModelParallelStrategy writes per_layer, uniform"):
        check_shards("padded")


# ---- from Lightning and the command line ----------------------------------------------------------------------------


@pytest.fixture
def folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(exported[0] / "llama/per_layer")


def test_uniform_is_refused_before_weights_are_read(folder, capsys, monkeypatch):
    monkeypatch.setattr(PruningModule, "configure_model", lambda self: pytest.fail("weights were read"))
    flags = [
        f"--model.path={folder}",
        "--model.allow_pruned=true",
        "--output_dir=out",
        "--pruning_ratio=0.1",
        *TINY_FLAGS,
    ]
    assert main(["prune", *flags]) == 2
    error = capsys.readouterr().err
    assert "a stock config has one number for all layers" in " ".join(error.split())
    assert "per_layer" in error
    assert main(["prune", *flags, "--layout=paded"]) == 2
    assert "Did you mean 'padded'?" in capsys.readouterr().err


def test_uniform_is_refused_after_calibration_when_only_then_widths_are_known(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TaylorImportanceCallback, "expected_model", lambda self, module: None)
    flags = [
        f"--model.path={folder}",
        "--model.allow_pruned=true",
        "--output_dir=out",
        "--pruning_ratio=0.1",
        *TINY_FLAGS,
    ]
    assert main(["prune", *flags]) == 2
    assert not (tmp_path / "out/model").exists()


def test_pruned_again_recovered_evaluated_and_written_in_another_layout(folder, capsys):
    flags = [f"--model.path={folder}", "--model.allow_pruned=true", "--output_dir=out", "--pruning_ratio=0.1"]
    flags += ["--data.recovery_sequences=4", "--data.validation_sequences=2", "--importance.recovery.rank=2"]
    assert main(["fit", *flags, "--layout=per_layer", *TINY_FLAGS]) == 0
    report = json.loads(Path("out/report.json").read_text())
    widths = report["stages"]["pruned"]["widths"]
    assert all(0 < width < before for width, before in zip(widths, WIDTHS, strict=True))
    assert report["saved"]["widths"] == widths
    assert report["saved"]["width"] is None
    assert "MLP width, mean of the layers" in Path("out/report.html").read_text()
    assert {"plan-1.json", "plan.json"} <= {path.name for path in Path("out/model").iterdir()}
    assert [g.num_units for g in find_groups(hfprune.load("out/model"))] == widths
    capsys.readouterr()
    assert main(["export", "--model.path=out/model", "--layout=padded", "--output_dir=padded"]) == 0
    assert "parameters are padding, all zero" in capsys.readouterr().out
    stages = {}
    for path in ("out/model", "padded"):
        evaluate = ["evaluate", f"--model.path={path}", f"--dense={folder}", "--output=eval.json", "--latency=false"]
        assert main([*evaluate, "--data.eval_window=16", "--data.eval_windows=2"]) == 0
        stages[path] = json.loads(Path("eval.json").read_text())["stages"]["model"]
    assert stages["padded"]["width"] == max(widths)
    assert stages["out/model"]["widths"] == widths
    assert stages["padded"]["fidelity"]["kl"] == pytest.approx(stages["out/model"]["fidelity"]["kl"], rel=1e-4)
    assert main(["export", "--model.path=out/model", "--output_dir=no"]) == 2
    assert "has one value per config field" in capsys.readouterr().err
    assert not Path("no").exists()


@pytest.mark.parametrize(
    ("name", "units"),
    [("llama", ("mlp",)), ("llama", ("mlp", "heads")), ("gpt2", ("mlp",)), ("gemma3", ("mlp", "layers"))],
)
def test_a_plan_by_hand_of_equal_widths_gives_a_stock_folder(name, units, tmp_path):
    """``config={}``: what follows from the kept units is found, in memory and by ``save_pretrained``."""
    model = tiny(name, dtype=torch.float32)
    groups = find_groups(model, units)
    keep = {group.name: torch.arange(group.num_units // 2 + 1).flip(0) for group in groups}
    if "heads" in units:
        keep |= {group.name: [0] for group in groups if group.kind == "heads"}
    plan = PruningPlan(model_class=type(model).__name__, groups=groups, keep=keep, config={})
    hfprune.apply_plan(model, plan)
    assert not is_per_layer(model.config)
    model.save_pretrained(tmp_path / "saved")
    export_model(model, None, plan, tmp_path / "uniform")
    for folder in ("saved", "uniform"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), logits(model))
