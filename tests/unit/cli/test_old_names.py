"""Old flags and keys of config files, which still work and name their successors."""

import re

import pytest

from hfprune.callbacks import TaylorImportanceCallback
from hfprune.cli.arguments import understood
from hfprune.cli.flag_table import parser_of
from hfprune.cli.flags import OLD_FLAGS, flags_of
from hfprune.cli.run import RunCLI
from hfprune.criteria import CoupledTaylor, SelfDistillation
from hfprune.utils.errors import ConfigError

RUN = ("--model.path=m", "--data.calibration=a.txt", "--pruning_ratio=0.2", "--output_dir=out")


def parsed(*args):
    """Returns the options of ``hfprune prune`` as parsed; nothing is built."""

    class ParsedError(Exception):
        pass

    class ParseOnly(RunCLI):
        def instantiate_classes(self):
            raise ParsedError

        def parse_arguments(self, parser, args):
            super().parse_arguments(parser, args)
            found.append((self.config, self.given))
            raise ParsedError

    found = []
    with pytest.raises(ParsedError):
        ParseOnly("prune", understood("prune", [*RUN, *args]))
    return found[0]


def test_every_old_flag_has_a_new_one():
    flags = flags_of("prune")
    assert set(OLD_FLAGS.values()) <= set(flags)
    assert not OLD_FLAGS.keys() & set(flags)
    assert "look_every" not in parser_of("prune").format_help()


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--importance.look_every=4", "check_every", 4),
        ("--importance.look-every=4", "check_every", 4),
        ("--importance.stop_when_settled=0.9", "early_stop_overlap", 0.9),
    ],
)
def test_an_old_flag_is_accepted(flag, name, value):
    with pytest.warns(FutureWarning, match=f"write --importance.{name}"):
        config, given = parsed(flag)
    assert config[f"importance.{name}"] == given[f"importance.{name}"] == value


def test_an_option_below_an_old_flag_is_accepted():
    with pytest.warns(FutureWarning, match=r"write --importance.self_distillation.alpha\."):
        config, _ = parsed("--importance.criterion=coupled_taylor", "--importance.distillation.alpha=0.3")
    assert config.importance.self_distillation.alpha == 0.3


def test_old_keys_of_a_config_file_are_accepted(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("importance:\n  look_every: null\n  distillation: {alpha: 0.3, temperature: 0.5}\n")
    with pytest.warns(FutureWarning) as caught:
        config, _ = parsed(f"--config={file}")
    assert config.importance.check_every is None
    assert (config.importance.self_distillation.alpha, config.importance.self_distillation.temperature) == (0.3, 0.5)
    assert "look_every" not in config.importance
    assert "distillation" not in config.importance
    assert any("write 'importance.check_every'" in str(item.message) for item in caught)


def test_both_names_of_an_option_are_refused(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("importance:\n  look_every: 4\n")
    with pytest.raises(ConfigError, match="is the old name of --importance.check_every"):
        parsed(f"--config={file}", "--importance.check_every=8")


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("look_every", "check_every", 4),
        ("stop_when_settled", "early_stop_overlap", 0.9),
        ("distillation", "self_distillation", SelfDistillation(alpha=0.3)),
    ],
)
def test_old_arguments_of_the_callback_are_accepted(old, new, value):
    options = {"pruning_ratio": 0.2, "criterion": CoupledTaylor()}
    text = re.escape(f"`{old}` is deprecated and will be removed in the next release: write `{new}`.")
    with pytest.warns(DeprecationWarning, match=text):
        callback = TaylorImportanceCallback(**options, **{old: value})
    assert getattr(callback.calibration, new) == value
    with pytest.raises(ConfigError, match=f"`{old}` is the old name of `{new}`"):
        TaylorImportanceCallback(**options, **{old: value, new: value})
