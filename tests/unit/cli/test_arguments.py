"""First guesses on the command line: what they become, and the mistakes that are answered without torch."""

import json
import shlex
import subprocess
import sys

import pytest
import yaml

from hfprune.cli.arguments import split, understood
from hfprune.cli.config_files import shipped_configs
from hfprune.utils.errors import ConfigError

FAST = f"--config={shipped_configs()['recipes/fast']}"
RUN = ["--model.path=DIR", "--pruning_ratio=0.2", "--output_dir=OUT"]


def read(line):
    command, *args = shlex.split(line)
    found = understood(command, args)
    assert understood(command, found) == found, "the parser's own words are understood as themselves"
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # the ten first guesses of a newcomer's trial that name something hfprune has
        ("prune DIR --ratio 0.2 -o OUT", [FAST, *RUN]),
        ("prune --model DIR --pruning_ratio 0.2 -o OUT", [FAST, *RUN]),
        (
            "prune DIR --method entropy --pruning_ratio 0.2 -o OUT",
            [RUN[0], "--importance.objective=entropy", *RUN[1:]],
        ),
        ("prune DIR --ratio 0.2 -o OUT --importance.units heads", [FAST, *RUN, '--importance.units=["heads"]']),
        (
            "prune DIR --ratio 0.2 -o OUT --importance.criterion activation_norm",
            [*RUN, "--importance.criterion=hfprune.criteria.ActivationNorm"],
        ),
        (
            "sweep DIR --methods '[entropy, wanda, magnitude]' -o OUT",
            [
                RUN[0],
                '--methods=[{"name": "entropy", "objective": "entropy"}, '
                '{"name": "wanda", "criterion": "hfprune.criteria.WandaStructured"}, '
                '{"name": "magnitude", "criterion": "hfprune.criteria.Magnitude"}]',
                RUN[2],
            ],
        ),
        # neighbours
        ("prune --pruning-ratio 0.2 --output-dir OUT --model=DIR", [FAST, *RUN[1:], RUN[0]]),
        ("prune DIR --ratio 0.2 -o OUT --data a.jsonl", [FAST, *RUN, "--data.calibration=a.jsonl"]),
        ("prune DIR --ratio 0.2 -o OUT --overwrite", [FAST, *RUN, "--overwrite=true"]),
        ("prune --overwrite DIR --ratio 0.2 -o OUT", [FAST, "--overwrite=true", *RUN]),
        ("prune DIR --ratio 0.2 -o OUT --overwrite false", [FAST, *RUN, "--overwrite=false"]),
        (
            "prune DIR --ratio 0.2 -o OUT --importance.units mlp heads",
            [FAST, *RUN, '--importance.units=["mlp", "heads"]'],
        ),
        ("prune DIR --ratio 0.2 -o OUT --importance.units [layers]", [*RUN, "--importance.units=[layers]"]),
        ("prune DIR --ratio 0.2 -o OUT --method fisher", [*RUN, "--importance.criterion=hfprune.criteria.Fisher"]),
        ("prune DIR --ratio 0.2 -o OUT --method Fisher", [*RUN, "--importance.criterion=hfprune.criteria.Fisher"]),
        (
            "prune DIR --ratio 0.2 -o OUT --method wanda",
            [*RUN, "--importance.criterion=hfprune.criteria.WandaStructured"],
        ),
        (
            "prune DIR --ratio 0.2 -o OUT --method sdmprune-20",
            [f"--config={shipped_configs()['methods/sdmprune_20']}", *RUN],
        ),
        (
            "prune DIR --method wanda --sparsity 2:4 -o OUT",
            [RUN[0], "--method=wanda", "--sparsity=2:4", RUN[2]],
        ),
        ("prune DIR --ratio 0.2 -o OUT --recipe paper", [f"--config={shipped_configs()['recipes/paper']}", *RUN]),
        ("prune DIR --ratio 0.2 -o OUT --importance.compensation null", [FAST, *RUN, "--importance.compensation=null"]),
        ("prune DIR --ratio 0.2 -o OUT --model.objective cross_entropy", [*RUN, "--model.objective=cross_entropy"]),
        ("fit DIR --ratio 0.2 -o OUT --lora_prune.every 5", [*RUN, "--lora_prune.every=5"]),
        ("fit DIR -c quickstart -o OUT", [RUN[0], f"--config={shipped_configs()['quickstart']}", RUN[2]]),
        ("sweep DIR --ratios 0.1 0.2 --seeds 1 -o OUT", [RUN[0], "--pruning_ratios=[0.1, 0.2]", "--seeds=[1]", RUN[2]]),
        ("sweep DIR --ratio 0.1,0.2 -o OUT", [RUN[0], "--pruning_ratios=[0.1, 0.2]", RUN[2]]),
        ("evaluate DIR --data t.txt -o f.json", [RUN[0], "--data.text=t.txt", "--output=f.json"]),
        ("export DIR --layout padded --output OUT", [RUN[0], "--layout=padded", RUN[2]]),
        ("fit DIR --ratio 0.2 -o OUT --trainer.logger wandb", [FAST, *RUN, "--trainer.logger=WandbLogger"]),
        ("fit DIR --ratio 0.2 -o OUT --trainer.logger false", [FAST, *RUN, "--trainer.logger=false"]),
        ("fit DIR --ratio 0.2 -o OUT --trainer.logger+=csv", [FAST, *RUN, "--trainer.logger+=CSVLogger"]),
        ("prune --model m.yaml --ratio 0.2 -o OUT", [FAST, "--model=m.yaml", *RUN[1:]]),
        (
            "prune DIR -o OUT --sparsity 0.5 --method ria --sparse.allocation outlier_weighed",
            [RUN[0], RUN[2], "--sparsity=0.5", "--method=ria", "--sparse.allocation=hfprune.sparse.OutlierWeighed"],
        ),
        (
            "prune --importance.criterion.help fisher",
            [FAST, "--importance.criterion.help=hfprune.criteria.Fisher"],
        ),
    ],
)
def test_guesses_become_flags(line, expected):
    found = understood(*(lambda words: (words[0], words[1:]))(shlex.split(line)))
    if any("criterion.help" in item for item in expected):
        expected = expected[1:]
    assert found == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # of the trial
        ("prune DIR --method hfprun --sparsity 0.2 -o OUT", "Unknown method 'hfprun'. Methods that remove units"),
        (
            "prune DIR --method hfprune --sparsity 0.2 -o OUT",
            "--method hfprune removes units: give --pruning_ratio 0.2",
        ),
        ("prune DIR --criterion ActivationNorm --ratio 0.2 -o OUT", "Did you mean 'importance.criterion'?"),
        ("prune DIR --pruning_ratio 20 -o OUT", "--pruning_ratio 20 is not between 0 and 1"),
        ("prune DIR --dry_run --ratio 0.2 -o OUT", "unrecognized arguments: --dry_run"),
        # neighbours
        ("prune DIR --ratoi 0.2 -o OUT", "unrecognized arguments: --ratoi 0.2. Did you mean 'ratio'?"),
        ("prune DIR --ratio 0.2", "--output_dir is required (short: -o)"),
        ("prune DIR -o OUT", "Give exactly one of --pruning_ratio"),
        ("prune DIR --ratio -o OUT", "--pruning_ratio needs a value: float"),
        ("prune DIR --ratio a -o OUT", "--pruning_ratio a: expected float."),
        ("prune DIR OTHER --ratio 0.2 -o OUT", "'OTHER' belongs to no flag; the model is 'DIR'"),
        ("prune DIR --method wnada --sparsity 0.5 -o OUT", "Did you mean 'wanda'?"),
        ("prune DIR --method sparsegpt --ratio 0.2 -o OUT", "give --sparsity 0.5 in place of --pruning_ratio"),
        ("prune DIR --method entropy --sparsity 0.2 -o OUT", "removes units: give --pruning_ratio 0.2"),
        ("prune DIR --recipe fsat --ratio 0.2 -o OUT", "Did you mean 'fast'?"),
        ("sweep DIR --methods entropy,sparsegpt -o OUT", "'sparsegpt' sets single weights to zero"),
        ("sweep DIR --methods entorpy -o OUT", "Did you mean 'entropy'?"),
        ("sweep DIR --recipe fast -o OUT", "--recipe belongs to prune and fit"),
        ("export DIR --layout padded -o OUT --data.calibration a.jsonl", "--data.calibration is not used by export"),
        ("export DIR --layout padded -o OUT --trainer.devices 2", "--trainer.devices is not used by export"),
        ("evaluate DIR --trainer.precision 16-true", "is not used by evaluate. Models run in their own type"),
        ("evaluate DIR --data.packing true", "--data.packing is not used by evaluate"),
        ("fit DIR --ratio 0.2 -o OUT --trainer.max_epoch 2", "Did you mean 'trainer.max_epochs'?"),
        ("fit DIR --ratio 0.2 -o OUT -c quikstart", "Did you mean 'quickstart'?"),
        # words of other tools, and values in another form
        ("prune DIR 0.2 -o OUT", "'0.2' belongs to no flag; the model is 'DIR'. Give --ratio 0.2."),
        ("prune DIR --ratio 20% -o OUT", "--pruning_ratio 20%: expected float. 20% is 0.2."),
        ("prune DIR --ratio a% -o OUT", "--pruning_ratio a%: expected float."),
        ("prune DIR --sparsity 0.5 -o OUT", "--method is required with --sparsity: a name (magnitude, "),
        ("prune DIR --method wanda -o OUT", "--sparsity is required with --method: share of zeros (0.5) or N:M"),
        ("prune DIR --method 2:4 -o OUT", "'2:4' is a sparsity: give --sparsity 2:4, and a method of magnitude, "),
        ("prune DIR --method llm-pruner --ratio 0.2 -o OUT", "'llm_pruner_channel' or 'llm_pruner_first' or "),
        ("prune DIR --ratio 0.2 -o OUT --seed 1", "Did you mean 'seed_everything'?"),
        ("prune DIR --ratio 0.2 -o OUT --device cuda", "Did you mean 'trainer.accelerator'?"),
        ("prune DIR --ratio 0.2 -o OUT --heads", "Did you mean 'importance.units'?"),
        ("prune DIR --ratio 0.2 -o OUT --nsamples 128", "Did you mean 'data.calibration_sequences'?"),
        ("prune DIR --ratio 0.2 -o OUT --dry-run", "'hfprune plan MODEL' shows what a ratio leaves of a model"),
        ("fit DIR --ratio 0.2 -o OUT --lr 1e-4", "Did you mean 'model.learning_rate'?"),
        ("fit DIR --ratio 0.2 -o OUT --epochs 2", "Did you mean 'trainer.max_epochs'?"),
        ("fit DIR --ratio 0.2 -o OUT --lora", "Did you mean 'importance.recovery'?"),
        ("fit DIR --ratio 0.2 -o OUT --train a.json", "Did you mean 'data.recovery'?"),
        ("fit DIR --ratio 0.2 -o OUT --resume", "Did you mean 'ckpt_path'?"),
        ("evaluate DIR --ppl", "Perplexity is always measured."),
    ],
)
def test_mistakes_are_answered_in_one_line(line, message):
    with pytest.raises(ConfigError) as error:
        read(line)
    assert message in str(error.value)


def test_mistakes_import_nothing_slow():
    code = (
        "import sys; from hfprune.cli import main\n"
        "status = main(['prune', 'DIR', '--ratoi', '0.2', '-o', 'OUT'])\n"
        "main(['fit', '--help']); main(['sweep', '--help-all'])\n"
        "slow = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "hfprune prune: error: unrecognized arguments: --ratoi 0.2. Did you mean 'ratio'?\n"


def test_short_names_in_a_file_and_a_flag_before_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("pruning_ratio: 0.3\nimportance: {criterion: fisher, units: heads, compensation: least_squares}\n")
    found = understood("prune", ["--ratio=0.2", "DIR", "-c", str(file), "-o", "OUT"])
    config = yaml.safe_load(next(arg for arg in found if arg.startswith("--config=")).partition("=")[2])
    assert config["importance"] == {
        "criterion": "hfprune.criteria.Fisher",
        "units": ["heads"],
        "compensation": "hfprune.compensation.LeastSquares",
    }
    assert "--pruning_ratio=0.2" in found
    assert not any("recipes" in arg for arg in found)


def test_a_file_that_chooses_no_method_gets_the_default_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("pruning_ratio: 0.3\nmodel: {path: DIR}\noutput_dir: OUT\n")
    assert understood("prune", ["-c", str(file)]) == [FAST, f"--config={file}"]


def test_the_output_folder_of_a_run_stands_for_its_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert understood("evaluate", [str(tmp_path)]) == [f"--model.path={tmp_path / 'model'}"]
    assert understood("evaluate", [str(tmp_path / "model")]) == [f"--model.path={tmp_path / 'model'}"]


def test_methods_of_a_sweep_from_configs_and_recipes():
    found = understood("sweep", ["DIR", "--methods", "best,llm_pruner_first", "-o", "OUT"])
    best, first = json.loads(next(arg for arg in found if arg.startswith("--methods=")).partition("=")[2])
    assert best["allocation"]["class_path"] == "hfprune.allocation.Sensitivity"
    assert (first["name"], first["objective"]) == ("llm_pruner_first", "cross_entropy")


@pytest.mark.parametrize("value", ["-1", "-2:", "-1,0", "-2--1", "-0.5"])
def test_a_word_that_begins_with_a_negative_number_is_a_value(value):
    assert [(item.name, item.value) for item in split("prune", ["--skip_layers", value, "M", "--ratio", "0.1"])] == [
        ("skip_layers", value),
        ("model.path", "M"),
        ("pruning_ratio", "0.1"),
    ]
