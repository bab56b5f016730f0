"""Messages of the library, which name Python arguments, in the words of the command line."""

import pytest
from jsonargparse import Namespace

from hfprune.cli.flag_names import settings_of, with_flags

CONFIG = Namespace(
    seed_everything=42,
    output_dir="out",
    pruning_ratio=0.2,
    layout="uniform",
    model=Namespace(path="~nobody/m", distillation=Namespace(alpha=1.5), learning_rate=0.0),
    data=Namespace(calibration="a.txt", seed=42, recovery="b.txt"),
    importance=Namespace(
        calibration_batches=0,
        check_every=16,
        recovery=Namespace(rank=0, alpha=64.0),
        criterion=Namespace(class_path="hfprune.criteria.Random", init_args=Namespace(seed=-1)),
    ),
    sparse=Namespace(calibration_batches=7, offload=None),
)
FLAGS = ("importance", "importance.recovery", "importance.criterion", "overwrite", "config", "model")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pruning_ratio=0.2 is not possible.", "--pruning_ratio 0.2 is not possible."),
        ("check_every=16 must be positive.", "--importance.check_every 16 must be positive."),
        ("rank=0 must be positive.", "--importance.recovery.rank 0 must be positive."),
        ("path='~nobody/m': no such user.", "--model.path '~nobody/m': no such user."),
        ("config='x': there is no such file.", "--config 'x': there is no such file."),
        ("Set `check_every` as well.", "Set --importance.check_every as well."),
        ("Or set `path` to a model.", "Or set --model.path to a model."),
        ("`distillation.alpha` is too large.", "--model.distillation.alpha is too large."),
        ("Set ``overwrite``, or another ``output_dir``.", "Set --overwrite, or another --output_dir."),
        ("layout=uniform needs `layout`.", "--layout uniform needs --layout."),
        ("Set fresh=True to start again.", "Set --overwrite true to start again."),
        ("offload=None or seed_everything=Nonesuch", "--sparse.offload null or --seed_everything Nonesuch"),
        # one name, several flags: the value decides
        ("calibration_batches=0 must be positive.", "--importance.calibration_batches 0 must be positive."),
        ("calibration_batches=7 exceed the data.", "--sparse.calibration_batches 7 exceed the data."),
        ("alpha=1.5 is not in [0, 1].", "--model.distillation.alpha 1.5 is not in [0, 1]."),
        ("seed=-1 is negative.", "--importance.criterion.seed -1 is negative."),
        ("model.path=x does not exist.", "--model.path x does not exist."),
        # left as they are
        ("calibration_batches=3 must be positive.", None),
        ("alpha=1 is not in [0, 1].", None),
        ("Give `calibration_batches`.", None),
        ("depth=3 is unknown, and so is `depth`.", None),
        ("--importance.check_every=0 is not positive.", None),
        ("Call hfprune.load(path, layout='uniform').", None),
        ("'runs/seed=42/check_every=16' is not empty.", None),
        ("runs/check_every=16 is not empty.", None),
        ("See https://example.org/?layout=uniform for more.", None),
        ("2 == 3, x==2, layout= and == say nothing.", None),
        ("The model's layers and the teacher's differ.", None),
    ],
)
def test_arguments_are_flags(message, shown):
    assert with_flags(message, settings_of(CONFIG, FLAGS)) == (message if shown is None else shown)


def test_groups_that_a_run_does_not_use_have_no_flags():
    settings = settings_of(CONFIG, FLAGS, without={"sparse"})
    assert with_flags("calibration_batches=3 is odd.", settings) == "--importance.calibration_batches 3 is odd."


def test_before_parsing_the_flags_of_the_parser_count():
    assert with_flags("overwrite=1 and rank=0", settings_of(None, FLAGS)) == "--overwrite 1 and rank=0"
