from argparse import ArgumentParser as PlainParser

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.recovery import LoraRecovery
from hfprune.utils.compat import instantiate, parser_actions


@pytest.mark.parametrize("kind", [PlainParser, ArgumentParser, LightningArgumentParser])
def test_argparse_lists_its_options(kind):
    parser = kind()
    parser.add_argument("--given", type=int)
    assert [action.dest for action in parser_actions(parser)][-1] == "given"


def test_jsonargparse_instantiates_the_classes_of_a_configuration():
    parser = ArgumentParser()
    parser.add_class_arguments(LoraRecovery, "recovery")
    assert instantiate(parser, parser.parse_args(["--recovery.rank=3"])).recovery == LoraRecovery(rank=3)
