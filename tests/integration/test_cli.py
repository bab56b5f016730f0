"""The command line as a user meets it: exit codes, one-line errors, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hfprune.cli import main
from hfprune.cli.entry import COMMANDS
from hfprune.evaluation import cache
from hfprune.evaluation import evaluate as stage
from tests.helpers.models import save_tiny, tiny, tiny_tokenizer, token_ids
from tests.helpers.runs import TINY_DATA_FLAGS, TINY_FLAGS

pytestmark = pytest.mark.usefixtures("empty_folder", "undrawn")

ROOT = Path(__file__).resolve().parents[2]


def prune(dense, *flags):
    return main(["prune", f"--model.path={dense}", "--output_dir=out", *TINY_FLAGS, *flags])


def error_of(capsys, code):
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = [line for line in captured.err.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    assert not Path("out").exists()
    return errors[0]


def test_help_imports_nothing_slow_and_lists_the_commands():
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['cli.py', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
        "try: runpy.run_path(sys.path[0] + '/cli.py', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "slow = {'torch', 'lightning', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_launcher_from_an_empty_folder(dense):
    """A real process: prune, then load the result where hfprune cannot be imported."""
    flags = [f"--model.path={dense}", "--pruning_ratio=0.2", "--output_dir=out", *TINY_FLAGS]
    done = subprocess.run([sys.executable, ROOT / "cli.py", "prune", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "parameters 6,848 -> 5,408 (target 5,478; 21.03% removed)" in done.stderr
    assert "% removed), MLP width 24 -> " in done.stderr
    code = (
        "import sys; sys.modules['hfprune'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('out/model'); AutoTokenizer.from_pretrained('out/model')\n"
        "print(model.config.intermediate_size, sum(p.numel() for p in model.parameters()))"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    budget = json.loads(Path("out/report.json").read_text())["plan"]["budget"]
    assert loaded.stdout.split() == [str(budget["width"]), str(budget["params"])]


def test_prune_evaluate_round_trip(dense, capsys):
    assert prune(dense, "--intermediate_size=12") == 0
    expected = ["figures", "importance.safetensors", "model", "plan.json", "report.html", "report.json"]
    assert sorted(p.name for p in Path("out").iterdir()) == expected
    names = {p.name for p in Path("out/model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "plan.json", "tokenizer.json"} <= names
    report = json.loads(Path("out/report.json").read_text())
    assert report["config"]["intermediate_size"] == 12
    capsys.readouterr()
    Path("text.txt").write_text("The assert statement is a convenient way. " * 30)
    flags = ["--data.text=text.txt", "--data.eval_window=16", "--data.eval_windows=2", "--latency=false"]
    code = main(["evaluate", "--model.path=out/model", f"--dense={dense}", "--output=eval.json", *flags])
    assert code == 0
    stages = json.loads(Path("eval.json").read_text())["stages"]
    assert stages["dense"]["fidelity"]["kl"] == pytest.approx(0, abs=1e-9)
    assert stages["model"]["fidelity"]["kl"] > 0
    assert stages["model"]["width"] == 12
    assert "Perplexity" in capsys.readouterr().out


def test_fit_resumes_from_last(dense):
    flags = ["--pruning_ratio=0.2", "--data.recovery_sequences=8", "--data.validation_sequences=2"]
    fit = ["fit", f"--model.path={dense}", "--output_dir=out", *TINY_FLAGS, *flags, "--importance.recovery.rank=2"]
    assert main([*fit, "--ckpt_path=last"]) == 0  # there is none yet: a command that can always be given again
    steps = json.loads(Path("out/report.json").read_text())["stages"]["recovered"]["optimizer_steps"]
    assert main([*fit, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert main([*fit, "--ckpt_path=out/checkpoints/last.ckpt", "--trainer.max_epochs=2"]) == 0  # after the end
    report = json.loads(Path("out/report.json").read_text())
    assert report["stages"]["recovered"]["optimizer_steps"] == 2 * steps
    assert report["recovery"]["rank"] == 2


@pytest.mark.parametrize("method", [["--pruning_ratio=0.2"], ["--method=wanda", "--sparsity=0.5"]])
def test_prune_calibrates_on_every_document(dense, method):
    texts = [f"the {n} is of the {n} and a {n % 5} " * 4 for n in range(24)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--data.calibration=a.jsonl", "--data.text=builtin", "--data.calibration_layout=crop"]
    assert prune(dense, *method, *flags, "--data.calibration_sequences=24") == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["data"]["calibration"]["sequences"] == 24
    assert not [text for text in report.get("warnings", []) if "sequences, not" in text]


def test_a_home_folder_in_data_flags(dense, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"the {n} is " * 9}) + "\n" for n in range(40)))
    Path("run.yaml").write_text("data: {calibration: ~/a.jsonl, text: ~/a.jsonl, token_cache: ~/cache}\n")
    assert prune(dense, "--config=run.yaml", "--pruning_ratio=0.2") == 0
    assert not Path("~").exists()


def test_sparse_prune_round_trip(dense, capsys):
    Path("sparse.yaml").write_text('method: {class_path: Wanda, init_args: {scope: matrix}}\nsparsity: "2:4"\n')
    assert prune(dense, "--config", "sparse.yaml", "--update=sparsegpt", "--sparse.offload=disk") == 0
    expected = ["figures", "model", "plan.json", "report.html", "report.json"]
    assert sorted(p.name for p in Path("out").iterdir()) == expected
    report = json.loads(Path("out/report.json").read_text())
    assert report["saved"]["sparsity"]["groups_with_n_zeros"] == 1440
    assert report["plan"]["sparse"]["update"]["name"] == "SparseGPT"
    assert "2,880 of 5,760 weights are zero (50.00%), in 1,440 groups of n:m" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert int((model.model.layers[2].mlp.down_proj.weight == 0).sum()) == 16 * 24 / 2
    assert prune(dense, "--method=wanda", "--sparsity=0.5") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method=wnada", "--sparsity=0.5"], "Did you mean 'wanda'?"),
        (["--method=wanda"], "--sparsity"),
        (["--method=wanda", "--sparsity=1.2"], "not in [0, 1)"),
        (["--method=wanda", "--sparsity=2:5"], "16 inputs, not a multiple of 5"),
        (["--method=sparsegpt", "--sparsity=0.5", "--update=sparsegpt"], "SparseGPT updates the weights itself"),
        (["--method=wanda", "--sparsity=0.5", "--update=obc"], "update='obc' is unknown. Known: sparsegpt"),
        (["--method=wanda", "--sparsity=0.5", "--pruning_ratio=0.2"], "pruning_ratio"),
    ],
)
def test_sparse_methods_refuse_in_one_line(dense, capsys, flags, expected):
    assert expected in error_of(capsys, prune(dense, *flags))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "Give exactly one of --pruning_ratio"),
        (["--pruning_ratio=0"], "not between 0 and 1"),
        (["--pruning_ratio=1"], "not between 0 and 1"),
        (["--pruning_ratio=-0.2"], "not between 0 and 1"),
        (["--pruning_ratio=0.9"], "largest possible --pruning_ratio is"),
        (["--mlp_ratio=2.8"], "largest possible --mlp_ratio is 1.4375"),
        (["--pruning_ratio=zero"], "--pruning_ratio zero: expected float."),
        (["--pruning_ratio=0.2", "--mlp_ratio=1"], "--pruning_ratio and --mlp_ratio were given"),
        (["--pruning_ration=0.2"], "Did you mean 'pruning_ratio'?"),
        (["--pruning_ratio=0.2", "--importance.criterion=Wnada"], "expected ActivationNorm or ActivationTaylor or"),
        (["--pruning_ratio=0.2", "--model.objective=entropi"], "Did you mean 'entropy'?"),
        (["--pruning_ratio=0.2", "--model.path=nowhere/at/all"], "does not exist"),
        (["--pruning_ratio=0.2", "--data.calibration=missing.jsonl"], "--data.calibration 'missing.jsonl' does not exist"),
        (["--pruning_ratio=0.2", "--data.calibration=nothing.txt"], "holds no text"),
        (["--pruning_ratio=0.2", "--data.calibration=short.txt"], "too short"),
        (["--pruning_ratio=0.2", "--data.calibration=picture.png"], "not read. Known: .txt"),
        (["--pruning_ratio=0.2", "--data.calibration=tokens.safetensors"], "tokenised with another tokenizer"),
        (["--pruning_ratio=0.2", "--data.seq_len=1000"], "maximum of 64 positions. Set --data.seq_len 64 or less."),
        (["--pruning_ratio=0.2", "--data.calibration_batch_size=0"], "--data.calibration_batch_size 0 must be positive"),
        (["--pruning_ratio=0.2", "--output_dir=busy"], "'busy' is not empty"),
        (["--pruning_ratio=0.2", "--output_dir=short.txt"], "is a file"),
        (["--pruning_ratio=0.2", "--config=typo.yaml"], "'modle.path' is not accepted. Did you mean 'model.path'?"),
        (["--pruning_ratio=0.2", "--config=missing.yaml"], "does not exist"),
        (["--pruning_ratio=0.2", "--trainer.max_epochs=null"], "max_epochs null without --trainer.max_steps"),
        (["--pruning_ratio=0.2", "--config=broken.yaml"], "Problems parsing config"),
        (["--pruning_ratio=0.2", "--trainer.strategy=fsdp"], "requires a GPU"),
        (["--pruning_ratio=0.2", "--trainer.precision=8"], "--trainer.precision 8: expected"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(dense, capsys, flags, expected):
    Path("nothing.txt").write_text(" \n")
    Path("short.txt").write_text("hello")
    Path("picture.png").write_bytes(b"\x89PNG")
    Path("busy").mkdir()
    Path("busy/file").write_text("mine")
    Path("typo.yaml").write_text("modle:\n  path: x\n")
    Path("broken.yaml").write_text("pruning_ratio: [0.2\n")
    save_file({"input_ids": torch.full((4, 16), 61)}, "tokens.safetensors")
    line = error_of(capsys, prune(dense, *flags))
    assert expected.lower() in line.lower()
    assert Path("busy/file").read_text() == "mine"


def test_missing_required_flag(capsys):
    assert "output_dir" in error_of(capsys, main(["prune", "--pruning_ratio=0.2"]))


def test_unknown_command(capsys):
    assert "Did you mean 'prune'?" in error_of(capsys, main(["prnue"]))


@pytest.mark.parametrize(
    "what", ["nan", "no_config", "no_tokenizer", "other_tokenizer", "not_a_model", "unknown_class"]
)
def test_bad_models(what, tmp_path, capsys):
    folder = save_tiny(tmp_path / "m")
    if what == "nan":
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.lm_head.weight[3, 3] = float("nan")
        model.save_pretrained(folder)
        expected = "embed_tokens.weight holds NaN"
    elif what == "no_config":
        (tmp_path / "m/config.json").unlink()
        expected = "has no config.json"
    elif what == "no_tokenizer":
        for file in (tmp_path / "m").glob("token*"):
            file.unlink()
        expected = "no usable tokenizer"
    elif what == "other_tokenizer":
        tiny_tokenizer(90).save_pretrained(folder)
        expected = "the model has 61 embeddings"
    elif what == "not_a_model":
        (tmp_path / "m/config.json").write_text("{")
        expected = "config.json is not valid JSON"
    else:
        config = json.loads((tmp_path / "m/config.json").read_text()) | {"model_type": "bloom"}
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        expected = "BloomForCausalLM"
    assert expected in error_of(capsys, prune(folder, "--pruning_ratio=0.2"))


def test_full_disk_while_writing_leaves_no_half_model(dense, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    def fail(self, folder, **kwargs):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        code = prune(dense, "--pruning_ratio=0.2")
    captured = capsys.readouterr()
    assert code == 2
    assert "No space left on device" in captured.err
    assert sorted(p.name for p in Path("out").iterdir()) == ["checkpoints", "importance.safetensors", "plan.json"]
    assert prune(dense, "--pruning_ratio=0.2", "--ckpt_path=last") == 0  # with a disk that has room again
    assert Path("out/model/model.safetensors").is_file()
    assert not Path("out/checkpoints").exists()


def test_too_small_disk_is_seen_before_calibration(dense, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr("hfprune.io.save.shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert "MiB free" in error_of(capsys, prune(dense, "--pruning_ratio=0.2"))


def test_overwrite_keeps_the_old_model_until_the_new_one_is_complete(dense, capsys, monkeypatch):
    assert prune(dense, "--intermediate_size=12") == 0
    with monkeypatch.context() as patch:
        patch.setattr("hfprune.io.save.measure_saved", lambda *a: (_ for _ in ()).throw(OSError(5, "I/O error")))
        assert prune(dense, "--intermediate_size=8", "--overwrite=true") == 2
    assert json.loads(Path("out/model/config.json").read_text())["intermediate_size"] == 12
    assert prune(dense, "--intermediate_size=8", "--overwrite=true") == 0
    assert json.loads(Path("out/model/config.json").read_text())["intermediate_size"] == 8
    assert not [p for p in Path("out").iterdir() if p.name.startswith(".")]


def test_saved_files_that_are_not_what_was_asked_are_an_error(dense, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def untie(self, folder, **kwargs):
        state = {name: t.clone() for name, t in self.state_dict().items()}
        save(self, folder, **kwargs)
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", untie)
        assert prune(dense, "--pruning_ratio=0.2") == 2
    assert "The saved files hold" in capsys.readouterr().err
    assert not Path("out/model").exists()


def test_pretokenised_calibration(dense):
    save_file({"input_ids": token_ids(5, 16).to(torch.int32)}, "ids.safetensors")
    assert prune(dense, "--pruning_ratio=0.2", "--data.calibration=ids.safetensors") == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["plan"]["calibration"]["tokens"] == 4 * 16
    assert "perplexity" not in report["stages"]["pruned"]


def test_evaluate_refuses_what_cannot_be_compared(dense, tmp_path, capsys):
    other = tiny("gpt2")
    other.resize_token_embeddings(70)
    other.save_pretrained(tmp_path / "other")
    flags = ["--data.eval_window=16", "--latency=false"]
    assert main(["evaluate", f"--model.path={dense}", f"--dense={tmp_path / 'other'}", *flags]) == 2
    assert "has 70 tokens, but the model has 61" in capsys.readouterr().err


EVALUATE = ["--data.eval_window=16", "--data.eval_windows=2", "--latency=false", "--output=eval.json"]


def evaluate(*flags):
    assert main(["evaluate", *EVALUATE, *flags]) == 0
    return json.loads(Path("eval.json").read_text())


def test_evaluate_says_that_a_kept_adapter_is_left_out(dense, caplog):
    assert prune(dense, "--intermediate_size=12") == 0
    evaluate("--model.path=out/model")
    assert "without the recovery" not in caplog.text
    Path("out/adapter").mkdir()
    Path("out/adapter/adapter_config.json").write_text("{}")
    evaluate("--model.path=out/model")
    assert "'out/model' is measured without the recovery, which is in" in caplog.text


def test_evaluate_a_checkpoint_equals_the_exported_model(dense, capsys):
    flags = ["--pruning_ratio=0.2", "--data.recovery_sequences=8", "--data.validation_sequences=2"]
    fit = ["fit", f"--model.path={dense}", "--output_dir=out", *TINY_FLAGS, *flags, "--importance.recovery.rank=2"]
    assert main(fit) == 0
    exported = evaluate("--model.path=out/model", f"--dense={dense}")["stages"]["model"]
    found = evaluate(f"--model.path={dense}", "--ckpt_path=out/checkpoints/last.ckpt", f"--dense={dense}")
    checkpoint = found["stages"]["model"]
    assert found["ckpt_path"] == "out/checkpoints/last.ckpt"
    assert checkpoint["width"] == exported["width"] < 24
    assert checkpoint["perplexity"]["value"] == pytest.approx(exported["perplexity"]["value"], rel=1e-5)
    assert exported["size"]["disk_bytes"] == Path("out/model/model.safetensors").stat().st_size
    assert checkpoint["size"]["disk_bytes"] is None
    for bad, message in (
        (["--ckpt_path=out/model/config.json"], "can be read"),
        (["--ckpt_path=out/none"], "is not a"),
    ):
        capsys.readouterr()
        assert main(["evaluate", f"--model.path={dense}", *EVALUATE, *bad]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_keeps_the_dense_predictions(dense, monkeypatch):
    assert prune(dense, "--intermediate_size=12") == 0
    flags = ["--model.path=out/model", f"--dense={dense}"]
    exact = evaluate(*flags)["stages"]["model"]["fidelity"]
    passes = []
    final_hidden = stage.window_hidden

    def spy(model, *args, **kwargs):
        passes.append(model.config.intermediate_size)
        return final_hidden(model, *args, **kwargs)

    for module in (cache, stage):
        monkeypatch.setattr(module, "window_hidden", spy)
    first, second = (evaluate(*flags, "--dense_cache=cache")["stages"]["model"]["fidelity"] for _ in range(2))
    assert passes == [24, 24, 12, 12]  # two windows of the dense model, once; the pruned model twice
    assert first == second
    assert len(list(Path("cache").iterdir())) == 1
    assert (exact["dense_top_k"], first["dense_top_k"]) == (None, 61)
    assert first["kl"] == pytest.approx(exact["kl"], rel=1e-5)


def test_evaluate_measures_speed_in_alternation(dense, capsys):
    stages = evaluate(f"--model.path={dense}", f"--dense={dense}", "--latency=true")["stages"]
    assert stages["dense"]["latency"]["prefill_ratio"] is None
    assert stages["model"]["latency"]["prefill_ratio"] > 0
    assert "in alternation" in " ".join(capsys.readouterr().out.split())


def test_evaluate_says_when_the_text_was_seen_in_calibration(dense, capsys):
    from pydoc_data.topics import topics

    documents = [text for _, text in sorted(topics.items())]
    Path("seen.json").write_text(json.dumps(documents[:6]))
    Path("seen.txt").write_text("\n\n".join(documents[:6]))
    Path("other.txt").write_text(documents[40])
    flags = ["--data.calibration=seen.json", "--data.recovery=other.txt", "--data.text=other.txt"]
    assert prune(dense, "--intermediate_size=12", "--data.calibration_sequences=1400", *flags) == 0
    with pytest.warns(UserWarning, match="13-grams of the evaluation text occur in the model.s calibration"):
        found = evaluate("--model.path=out/model", "--data.text=seen.txt", "--data.eval_windows=null")
    assert "results will be too optimistic" in found["warnings"][0]
    Path("new.txt").write_text("Nothing of this stands in there, not a line of it, and so it goes on. " * 20)
    assert evaluate("--model.path=out/model", "--data.text=new.txt")["warnings"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit=5"], "--limit belongs to zero-shot tasks: give --tasks"),
        (["--task_data=here"], "--task_data belongs to"),
        (["--tasks=arc_easy", "--task_data=nowhere"], "'nowhere' is not a folder"),
        (["--tasks=,"], "must name at least one task"),
        (["--data.eval_window=999"], "999 tokens exceed the model's maximum of 64 positions"),
        (["--data.text=empty.txt"], "holds no text"),
        (["--ckpt_path=none.ckpt"], "'none.ckpt' is not a checkpoint"),
        (["--output=folder"], "--output 'folder' is a folder"),
        (["--output=empty.txt/eval.json"], "'empty.txt/eval.json' cannot be written"),
        (["--dense_cache=cache"], "dense_cache stores the dense model's predictions and requires --dense"),
        (["--dense=./nowhere/at/all"], "--dense './nowhere/at/all' does not exist"),
        (["--num_fewshot=3"], "--num_fewshot belongs to zero-shot tasks"),
        (["--share_prefixes=true"], "--share_prefixes belongs to zero-shot tasks"),
        (["--trainer.devices=2"], "evaluate runs on one device"),
        (["--trainer.precision=bf16-true"], "--model.dtype"),
    ],
)
def test_evaluate_refuses_in_one_line(dense, capsys, flags, message):
    Path("empty.txt").write_text("\n")
    Path("folder").mkdir()
    code = main(["evaluate", f"--model.path={dense}", *EVALUATE, *flags])
    assert message in error_of(capsys, code)
    assert not Path("eval.json").exists()


def test_evaluate_refuses_a_model_without_a_tokenizer(tmp_path, capsys):
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "bare")
    code = main(["evaluate", f"--model.path={tmp_path / 'bare'}", *EVALUATE])
    assert "no usable tokenizer" in error_of(capsys, code)


def test_evaluate_without_a_network(capsys):
    """Tests run offline: a hub id that is not in the cache."""
    code = main(["evaluate", "--model.path=nobody/no-such-model", *EVALUATE])
    assert "nobody/no-such-model" in error_of(capsys, code)


def test_sweep_from_yaml_and_resumed(dense, capsys):
    Path("words.txt").write_text("The assert is a statement of the language and so is while. " * 20)
    Path("sweep.yaml").write_text(
        "pruning_ratios: [0.2]\nlatency: false\ntexts: {words: words.txt}\nmethods:\n"
        "- {name: signed, objective: entropy, criterion: {class_path: hfprune.criteria.ActivationTaylor,"
        " init_args: {reduction: signed}}}\n- {name: l1, criterion: {class_path: hfprune.criteria.Magnitude,"
        " init_args: {norm: l1}}}\n"
    )
    command = ["sweep", "--config=sweep.yaml", f"--model.path={dense}", "--output_dir=out", *TINY_DATA_FLAGS]
    assert main(command) == 0
    assert "words" in capsys.readouterr().out
    found = json.loads(Path("out/table.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["dense", "signed", "l1"]
    before = Path("out/cells/signed-0.2-seed42.json").stat().st_mtime_ns
    assert main(command) == 0
    assert Path("out/cells/signed-0.2-seed42.json").stat().st_mtime_ns == before
    config = yaml.safe_load(Path("out/recommended.yaml").read_text())
    chosen = {"signed": "ActivationTaylor", "l1": "Magnitude"}[found["recommended"][0]["method"]]
    assert config["importance"]["criterion"]["class_path"].endswith(chosen)
    assert "hfprune fit --config out/recommended.yaml" in found["recommended_command"]
    assert main(["prune", "--config=out/recommended.yaml", "--output_dir=pruned", *TINY_FLAGS]) == 0
    report = json.loads(Path("pruned/report.json").read_text())
    setting = {"reduction": "signed"} if chosen == "ActivationTaylor" else {"norm": "l1"}
    assert setting.items() <= report["plan"]["criterion"].items()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "texts that do not calibrate"),
        (["--data.text=builtin"], "texts that do not calibrate"),
        (["--data.text=words.txt", "--seeds=[1,1]"], "each once"),
        (["--data.text=words.txt", "--pruning_ratios=[0.99]"], "largest possible `pruning_ratio`"),
        (["--data.text=words.txt", "--methods=[{name: a}]"], "needs an objective"),
        (["--data.text=nowhere.txt"], "does not exist"),
    ],
)
def test_sweep_refuses_in_one_line(dense, capsys, flags, message):
    Path("words.txt").write_text("The assert is a statement of the language and so is while. " * 20)
    code = main(["sweep", f"--model.path={dense}", "--output_dir=out", *TINY_DATA_FLAGS, *flags])
    assert message in error_of(capsys, code)


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_parses_and_names_its_command(path, monkeypatch):
    """The command in a config's header runs that config; here up to the point where models would be loaded."""
    from hfprune.cli.launch import CLASSES

    header = [line for line in path.read_text().splitlines() if line.startswith("#") and "hfprune " in line]
    words = header[0].removeprefix("#").split()
    command = words[words.index("hfprune") + 1]
    assert f"configs/{path.relative_to(ROOT / 'configs')}" in words
    monkeypatch.setattr("hfprune.modules.causal_lm.check_model_path", lambda path, **loading: None)
    monkeypatch.setattr("hfprune.data.roles.check_source", lambda source, flag: None)
    flags = [
        f"--config={path}",
        *(["--output_dir=out", "--pruning_ratio=0.2"] if path.parent.name == "recipes" else []),
    ]
    cli = CLASSES[command](command, flags)
    assert yaml.safe_load(path.read_text()).keys() <= cli.config.as_dict().keys()
