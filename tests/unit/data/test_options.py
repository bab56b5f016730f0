"""Options of TextDataModule: five groups in Python, flat on the command line."""

import inspect

import pytest

from hfprune import LoadingOptions, PruningModule, TextDataModule
from hfprune.data import BatchOptions, ReadingOptions, SampleOptions, TokenOptions, WindowOptions
from hfprune.modules import OptimizationOptions
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny

GROUPS = {
    "reading": ReadingOptions(text_field="body", split="validation"),
    "tokens": TokenOptions(seq_len=32, bos="never", overlong="cut", packing=True),
    "samples": SampleOptions(calibration_sequences=3, recovery_sequences=4, validation_sequences=5, seed=6),
    "batches": BatchOptions(calibration_batch_size=2, batch_size=4, num_workers=1, shuffle_buffer=7),
    "windows": WindowOptions(eval_windows=1, eval_window=16, eval_stride=8),
}


def plain(data):
    shown = {name: value for name, value in vars(data).items() if not name.startswith(("_", "prepare", "allow"))}
    return shown | {"stream": data._stream, "roles": vars(data._roles)}


def test_groups_and_single_keywords_are_equal():
    flat = {name: value for group in GROUPS.values() for name, value in vars(group).items()}
    grouped, single = TextDataModule("builtin", **GROUPS), TextDataModule("builtin", **flat)
    assert str(plain(grouped)) == str(plain(single))
    assert (grouped.seq_len, grouped.seed, grouped.batch_size, grouped.eval_stride) == (32, 6, 4, 8)
    assert grouped._stream.text_field == "body"


@pytest.mark.parametrize("kind", [TextDataModule, PruningModule])
def test_constructors_have_ten_arguments_and_flat_signatures(kind):
    written = inspect.signature(kind.__init__.__wrapped__).parameters
    assert len(written) - 1 <= 10
    flat = inspect.signature(kind).parameters
    assert len(flat) > len(written)
    assert not {"tokens", "loading", "samples"} & set(flat)
    documented = kind.__init__.__doc__
    assert [name for name in set(flat) - set(written) if f"\n    {name}: " not in documented] == []


def test_an_option_is_given_once(tmp_path):
    with pytest.raises(ConfigError, match="`seq_len` is an option of `tokens`"):
        TextDataModule("builtin", seq_len=3, tokens=TokenOptions())
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(ConfigError, match="`learning_rate` is an option of `optimization`"):
        PruningModule(folder, learning_rate=1e-3, optimization=OptimizationOptions())
    with pytest.raises(ConfigError, match=r"learning_rate=0 must be positive"):
        PruningModule(folder, learning_rate=0)
    module = PruningModule(folder, loading=LoadingOptions(dtype="float64"), optimization=OptimizationOptions())
    assert (module.dtype_name, module.learning_rate, module.hparams["dtype"]) == ("float64", 4e-4, "float64")
    assert "token" not in module.hparams
