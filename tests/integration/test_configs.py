"""Every shipped file on the published shapes, budgets of several sources, and broken files: one line, exit code 2."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from hfprune.cli import main
from hfprune.cli.launch import CLASSES
from tests.helpers.models import save_tiny
from tests.helpers.published import CONFIGS, command_of, resolved, unchecked

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
PRUNING = [path for path in FILES if command_of(path)[0] in ("fit", "prune")]


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Returns what parses a command up to the point where models would be loaded."""
    monkeypatch.chdir(ROOT)
    unchecked(monkeypatch)

    def parsed(command, *flags):
        return CLASSES[command](command, [*flags, f"--output_dir={tmp_path / 'out'}"])

    return parsed


@pytest.mark.parametrize("path", PRUNING, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_every_file_is_resolved_on_the_published_shapes(path, parse):
    command, *flags = command_of(path)
    cli = parse(command, *flags)
    for name in CONFIGS:
        pruning = resolved(cli, name, layout=name == "smollm2-135m")
        found = pruning.check(cli.trainer.lightning_module)
        if found is not None:  # sparse methods leave every shape
            step = 0.02 if path.stem == "llm_pruner_channel" else 2e-3  # hidden sizes are multiples of the query heads
            step = 0.03 * cli.config.pruning_ratio if cli.config.round_to == "auto" else step
            assert found.provisional or found.removed_share == pytest.approx(cli.config.pruning_ratio, abs=step)


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_loraprune_runs_on_every_published_shape(ratio, parse):
    """LoRAPrune's published settings, 20, 30 and 50 %: heads that a stock config states, neurons make up the rest."""
    cli = parse("fit", "--config=configs/recovery/loraprune.yaml", f"--pruning_ratio={ratio}")
    for name, config in CONFIGS.items():
        found = resolved(cli, name, layout=False).check(cli.trainer.lightning_module)
        heads = next(k for k in found.kinds if k.kind == "heads").kept[0]
        queries = heads * config.num_attention_heads // config.num_key_value_heads
        assert config.model_type != "llama" or config.hidden_size % queries == 0
        assert abs(found.params - found.target_params) < 3e-4 * found.dense_params
        assert found.describe().count("a stock config states") == (name.startswith("llama"))


def test_other_layouts_choose_any_number_of_heads(parse):
    cli = parse("fit", "--config=configs/recovery/loraprune.yaml", "--layout=per_layer")
    found = resolved(cli, "llama-2-7b", layout=False).check(cli.trainer.lightning_module)
    assert next(k for k in found.kinds if k.kind == "heads").kept[0] == 25


# ---- budgets of several sources -------------------------------------------------------------------------------------


METHOD = "--config=configs/methods/sdmprune_20.yaml"


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([METHOD, "--mlp_ratio=2.741"], {"mlp_ratio": 2.741}),
        (["--mlp_ratio", "2.741", "--config", "configs/methods/sdmprune_20.yaml"], {"mlp_ratio": 2.741}),
        (["--pruning_ratio=0.1", METHOD], {"pruning_ratio": 0.1}),
        ([METHOD, "--target_params=100000000"], {"target_params": 100000000}),
        ([METHOD, "--intermediate_size", "1000"], {"intermediate_size": 1000}),
        (["--config=configs/methods/sdmprune_30.yaml", METHOD], {"pruning_ratio": 0.2}),
        ([METHOD, "--config={width}"], {"intermediate_size": 512}),
        (["--data.seq_len=16", METHOD], {"pruning_ratio": 0.2}),
        ([METHOD, "--pruning_ratio=null", "--mlp_ratio=2"], {"mlp_ratio": 2.0}),
    ],
)
def test_the_last_source_of_a_budget_counts(flags, asked, parse, tmp_path):
    (tmp_path / "width.yaml").write_text("intermediate_size: 512\n")
    config = parse("prune", *(flag.format(width=tmp_path / "width.yaml") for flag in flags)).config
    names = ("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio")
    assert {name: config[name] for name in names if config[name] is not None} == asked
    assert config.data.seq_len == (16 if "--data.seq_len=16" in flags else 1024)


def test_a_flag_counts_over_the_file_of_its_group(parse, tmp_path):
    (tmp_path / "data.yaml").write_text("seq_len: 32\nbatch_size: 3\n")
    config = parse("prune", "--data.seq_len=16", f"--data={tmp_path / 'data.yaml'}", "--pruning_ratio=0.2").config
    assert (config.data.seq_len, config.data.batch_size) == (16, 3)


def test_an_allocation_with_a_budget_of_its_own_replaces_the_file_s(parse, tmp_path):
    """``docs/units.md``: LLM-Pruner's block-wise setting on top of its file."""
    blocks = (ROOT / "docs/units.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "blocks.yaml").write_text(blocks)
    flags = ["--config=configs/methods/llm_pruner_first.yaml", f"--config={tmp_path / 'blocks.yaml'}"]
    cli = parse("prune", *flags)
    assert cli.config.pruning_ratio is None
    pruning = resolved(cli, "llama-2-7b", layout=False)
    assert pruning.check(cli.trainer.lightning_module).params == 5_422_977_024  # published for LLaMA-7B


def test_a_width_that_was_meant_as_a_share_is_loud(parse):
    cli = parse("prune", "--mlp_ratio=0.2")
    text = resolved(cli, "smollm2-135m", layout=False).check(cli.trainer.lightning_module).warning
    assert text.startswith("mlp_ratio=0.2 removes 54.8% of the parameters, more than half: 134,515,008 -> ")
    assert "MLP width 1536 -> 115" in text
    assert "not a share" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pruning_ratio=0.2", "--mlp_ratio=2"], "Give exactly one of"),
        ([METHOD, "--pruning_ratio=0.2", "--mlp_ratio=2"], "Give exactly one of"),
        (["--config={two}"], "Give exactly one of"),
        ([METHOD, "--pruning_ratio=null"], "Give exactly one of"),
        ([METHOD, "--ratoi=0.3"], "Did you mean 'ratio'?"),
        ([METHOD, "--width=512"], "Did you mean 'intermediate_size'?"),
    ],
)
def test_budgets_that_contradict_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "two.yaml").write_text("pruning_ratio: 0.2\nmlp_ratio: 2.0\n")
    flags = [flag.format(two=tmp_path / "two.yaml") for flag in flags]
    assert main(["prune", *flags, "--model.path=nowhere", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err


# ---- broken files ----------------------------------------------------------------------------------------------------


def keys_of(node, path=()):
    """Yields the path of every key of a nested mapping, lists of mappings included."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from keys_of(value, (*path, key))


def typo(name):
    return name[0] + name[2] + name[1] + name[3:] + "q" if len(name) > 2 else f"{name}q"


def broken(config, path, how):
    """Returns a copy of ``config`` with one key broken, None where that way of breaking does not apply."""
    found = copy.deepcopy(config)
    *parents, key = path
    node = found
    for part in parents:
        node = node[part]
    value = node[key]
    if how == "typo":
        if not isinstance(key, str):
            return None
        node[typo(key)] = node.pop(key)
    elif how == "type":
        node[key] = "twelve" if isinstance(value, int | float | bool | dict | list) else {"deep": [1, {"er": 2}]}
    elif how == "null":
        node[key] = None
    elif how == "range":
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        node[key] = -7
    elif how == "nested":
        node[key] = {"class_path": "nowhere.at.All", "init_args": {"x": value}}
    return found


MUTATIONS = [
    (path, keys, how)
    for path in FILES
    for keys in keys_of(yaml.safe_load(path.read_text()))
    for how in ("typo", "type", "null", "range", "nested")
]
MAY_PASS = {"typo", "null", "range", "type"}


def sample(number, seed):
    return random.Random(seed).sample(MUTATIONS, min(number, len(MUTATIONS)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models") / "dense")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


class Started(Exception):
    """A command got as far as its work."""


def run_broken(case, dense, tmp_path, monkeypatch, capsys):
    """Runs a command with a broken file; returns what it printed, None where the broken value is a right one."""
    path, keys, how = case
    config = broken(yaml.safe_load(path.read_text()), keys, how)
    if config is None:
        return None
    out = tmp_path / "out"
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(config))
    command, *_ = command_of(path)
    flags = [f"--config={tmp_path / 'broken.yaml'}"]
    flags += [] if keys[:1] == ("model",) and len(keys) == 1 else [f"--model.path={dense}"]
    flags += [f"--output_dir={out}", "--overwrite=true"] if command in ("fit", "prune") else []
    flags += [f"--output_dir={out}"] if command == "sweep" else []
    code = main([command, *flags])
    err = capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt"], (case, err)
    assert (code, err.count("error:"), "Traceback" in err) == (2, 1, False), (path.name, keys, how, code, err)
    return err


def start(*args, **kwargs):
    raise Started


@pytest.fixture
def stopped(monkeypatch):
    """Commands end where models would be loaded: with ``Started``. No text is read."""
    monkeypatch.setattr("hfprune.data.text.TextDataModule._build_for_fit", lambda self: None)
    monkeypatch.setattr("hfprune.data.text.TextDataModule.overlap", lambda self: None)
    monkeypatch.setattr("hfprune.data.text.warn_of_overlap", lambda found: None)
    monkeypatch.setattr("hfprune.modules.causal_lm.load_causal_lm", start)
    monkeypatch.setattr("hfprune.sweep.runner.Sweep.run", start)
    monkeypatch.setattr("hfprune.trainer.PruneTrainer.evaluate", start)


def check(cases, dense, tmp_path, monkeypatch, capsys):
    refused = 0
    for case in cases:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
        try:
            refused += run_broken(case, dense, tmp_path, monkeypatch, capsys) is not None
        except Started:
            assert case[2] in MAY_PASS, case
            capsys.readouterr()
        finally:
            assert (tmp_path / "out/mine.txt").read_text() == "mine"
            shutil.rmtree(tmp_path / "out")
    return refused


@pytest.mark.filterwarnings("ignore:.*max_epochs. was not set")  # Lightning takes null
def test_broken_files_are_one_line(dense, tmp_path, monkeypatch, capsys, stopped):
    """A sample of all keys of all files, each broken in one way; nothing of the output folder is touched."""
    monkeypatch.chdir(tmp_path)
    assert check(sample(100, seed=0), dense, tmp_path, monkeypatch, capsys) > 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_epochs. was not set")
def test_every_key_broken_in_every_way_is_one_line(dense, tmp_path, monkeypatch, capsys, stopped):
    monkeypatch.chdir(tmp_path)
    assert check(MUTATIONS, dense, tmp_path, monkeypatch, capsys) > len(MUTATIONS) // 2
