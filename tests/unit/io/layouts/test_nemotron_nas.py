"""Layout ``nemotron_nas``: what it writes, what it refuses."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from hfprune.io.layouts import LAYOUTS
from hfprune.io.layouts.nemotron_nas import ffn_mult, read_width
from hfprune.io.save import export_model
from hfprune.publishing.engine_check import check_engine
from hfprune.publishing.inspection import inspect_folder
from hfprune.utils.errors import ConfigError
from tests.helpers.served import LARGE, cut

WIDE = LARGE | {"intermediate_size": 768}
WIDTHS = (256, 768, 512, 256)


def model(config=None, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**WIDE | changes)).eval()


@pytest.mark.parametrize("hidden", [64, 459, 576, 2048, 5120])
def test_every_reader_computes_the_width_from_the_factor(hidden):
    """As NVIDIA's ``_ffn_mult_to_intermediate_size``, which readers have copied."""
    for width in range(256, 20480, 256):
        found = int(2 * ffn_mult(width, hidden) * hidden / 3)
        assert (
            (found if found % 256 == 0 else found + 256 - found % 256)
            == width
            == read_width(ffn_mult(width, hidden), hidden)
        )


def test_the_folder_is_the_same_model_in_transformers(tmp_path):
    dense = model(tie_word_embeddings=True)
    plan = cut(dense, widths=WIDTHS, without=(2,))
    saved = export_model(dense, None, plan, tmp_path / "m", layout="nemotron_nas")
    assert saved["widths"] == [256, 768, 256]
    data = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (data["model_type"], data["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert not {"per_layer_config", "hfprune", "num_key_value_heads"} & data.keys()
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"]
    assert [block["attention"]["n_heads_in_group"] for block in data["block_configs"]] == [2, 2, 2]
    assert min(check_engine(tmp_path / "m", dense, "transformers").equal_tokens) == 32
    found = inspect_folder(str(tmp_path / "m"))
    assert (found["layout"], found["model"]["mlp_widths"]) == ("nemotron_nas", [256, 768, 256])
    assert found["engines"]["mlx"]["state"] == "loads"
    assert found["engines"]["hfprune"]["state"] == found["engines"]["openvino"]["state"] == "refused"


@pytest.mark.parametrize(
    ("changes", "units", "reason"),
    [
        ({}, {"widths": (256, 77, 512, 768)}, "1 widths are not, such as 77; prune with round_to=256"),
        ({}, {"widths": WIDTHS, "heads": (1, 2, 2, 2)}, "all layers have the same query heads"),
        ({}, {"widths": WIDTHS, "heads": (1, 1, 1, 1)}, "64 / 2 is not 16"),
        ({"hidden_act": "relu"}, {"widths": WIDTHS}, "activation silu, not relu"),
        ("mistral", {"widths": WIDTHS}, "the format is for LlamaForCausalLM, this is MistralForCausalLM"),
    ],
)
def test_refused_before_writing(changes, units, reason, tmp_path):
    found = model(MistralConfig(**WIDE)) if changes == "mistral" else model(**changes)
    plan = cut(found, **units)
    for refused in (
        lambda: LAYOUTS.get("nemotron_nas").check(found),
        lambda: export_model(found, None, plan, tmp_path / "m", layout="nemotron_nas"),
    ):
        with pytest.raises(ConfigError, match=reason):
            refused()
    assert list(tmp_path.iterdir()) == []


def test_layers_without_a_sub_layer_are_refused():
    found = model()
    del found.model.layers[1].self_attn
    with pytest.raises(ConfigError, match="every layer has attention and MLP here"):
        LAYOUTS.get("nemotron_nas").check(found)
