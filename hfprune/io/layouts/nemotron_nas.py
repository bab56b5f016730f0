"""Layout ``nemotron_nas``: Llama models whose MLP widths differ, in the format of NVIDIA's Llama-Nemotron models.

vLLM, SGLang, TensorRT-LLM and mlx-lm have a class for it (``DeciLMForCausalLM``), without code of hfprune. config.json
has one entry of ``block_configs`` per layer. A width is written as ``ffn_mult``, from which every reader computes
``int(2 * ffn_mult * hidden_size / 3)``, rounded up to a multiple of 256. All layers have the same query heads.

The weights are those of the Llama model, under the same names. ``modeling_decilm.py`` holds the config class, which
vLLM reads with ``trust_remote_code=True``, and the model for transformers. hfprune does not load this layout: keep the
model from which it was exported.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune.io.layouts.base import LAYOUTS, Layout
from hfprune.models.groups import class_name, find_layers, mlp_widths
from hfprune.utils.errors import ConfigError, OutputError

STEP = 256
"""Widths are multiples of this number."""

MODEL_TYPE = "nemotron-nas"
_MODULE = "modeling_decilm"
_SHAPED = ("per_layer_config", "hfprune", "auto_map", "num_key_value_heads")
_NO_CHANGES = {"no_op": False, "replace_with_linear": False, "sparsify": None}
_FULL_ATTENTION = {
    **_NO_CHANGES,
    "num_sink_tokens": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}

_CODE = '''"""Llama whose layers differ in width, format nemotron-nas, by hfprune. Needs torch and transformers."""

import copy
from types import SimpleNamespace

import transformers


class DeciLMConfig(transformers.LlamaConfig):
    """Llama config, with the sizes of each layer in `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.blocks = block_configs or []
        if self.blocks:
            self.num_key_value_heads = self.num_attention_heads // self.blocks[0]["attention"]["n_heads_in_group"]

    @property
    def block_configs(self):
        parts = [{key: SimpleNamespace(**part) for key, part in block.items()} for block in self.blocks]
        return [SimpleNamespace(**part) for part in parts]

    def width(self, index):
        """Returns the MLP width of a layer."""
        width = int(2 * self.blocks[index]["ffn"]["ffn_mult"] * self.hidden_size / 3)
        return width + -width % 256

    def to_dict(self):
        return self._written(super().to_dict())

    def to_diff_dict(self):
        return self._written(super().to_diff_dict())

    def _written(self, data):
        blocks = data.pop("blocks", None)
        return {**data, "block_configs": blocks} if blocks else data


class DeciLMForCausalLM(transformers.LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            own = copy.copy(config)
            own.intermediate_size = config.width(index)
            layer.mlp = type(layer.mlp)(own)
        self.post_init()
'''


class NemotronNasLayout(Layout):
    """``nemotron_nas``: one entry per layer in ``block_configs`` of config.json.

    Example:
        >>> LAYOUTS.get("nemotron_nas").by_runs
        False
    """

    name = "nemotron_nas"
    shards = False
    by_runs = False

    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` with the first property that the format does not describe."""
        reason = not_described(model)
        if reason:
            raise ConfigError(f"layout='nemotron_nas' cannot describe the pruned model: {reason}.")

    def written(self, model: Any) -> Any:
        """Returns ``model``; raises ``ConfigError`` as :meth:`check` does."""
        self.check(model)
        return model

    def complete(self, folder: Path, model: Any) -> None:
        """Rewrites config.json of a Llama folder, and adds its code."""
        path, widths = folder / "config.json", list(mlp_widths(model))
        data = described(json.loads(path.read_text(encoding="utf-8")), widths, heads=_heads(model)[0])
        found = [read_width(block["ffn"]["ffn_mult"], data["hidden_size"]) for block in data["block_configs"]]
        if found != widths:
            raise OutputError(f"The widths in block_configs are {found}, those of the model {widths}.")
        (folder / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


LAYOUTS.add(NemotronNasLayout.name, NemotronNasLayout())


def not_described(model: Any) -> str:
    """Returns why the format cannot describe a model; empty if it can.

    Args:
        model: A pruned model; only shapes are read.
    """
    name, config = class_name(model), model.config
    if name != "LlamaForCausalLM":
        return f"the format is for LlamaForCausalLM, this is {name}; use layout='padded'"
    if config.hidden_act != "silu":
        return f"its layers have the activation silu, not {config.hidden_act}"
    if any(_lacks(layer) for layer in find_layers(model)):
        return "every layer has attention and MLP here; use layout='padded'"
    wrong = sorted({width for width in mlp_widths(model) if width % STEP})
    if wrong:
        return (
            f"widths are multiples of {STEP}, and {len(wrong)} widths are not, such as {wrong[0]}; prune with "
            f"round_to={STEP}"
        )
    heads = _heads(model)
    if len(set(heads)) > 1:
        return "all layers have the same query heads; leave 'heads' out of the units, or use layout='per_layer'"
    first: Any = find_layers(model)[0]
    size = first.self_attn.head_dim
    if heads[0][0] * size != config.hidden_size:
        return (
            f"the size of a head is the hidden size divided by the query heads, and {config.hidden_size} / "
            f"{heads[0][0]} is not {size}; leave 'heads' and 'channels' out of the units"
        )
    return ""


def described(config: Mapping[str, Any], widths: Sequence[int], *, heads: tuple[int, int]) -> dict[str, Any]:
    """Returns the config.json of this format.

    Args:
        config: config.json of a Llama model.
        widths: MLP width of each layer.
        heads: Query heads and key-value heads of a layer.
    """
    queries, keys = heads
    attention = {**_FULL_ATTENTION, "n_heads_in_group": queries // keys}
    blocks = [
        {"attention": attention, "ffn": {**_NO_CHANGES, "ffn_mult": ffn_mult(width, config["hidden_size"])}}
        for width in widths
    ]
    kept = {key: value for key, value in config.items() if key not in _SHAPED}
    auto = {"AutoConfig": f"{_MODULE}.DeciLMConfig", "AutoModelForCausalLM": f"{_MODULE}.DeciLMForCausalLM"}
    return kept | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": auto,
        "block_configs": blocks,
        "intermediate_size": max(widths),
        "model_type": MODEL_TYPE,
    }


def ffn_mult(width: int, hidden_size: int) -> float:
    """Returns the factor from which readers compute ``width``, a multiple of 256.

    >>> [read_width(ffn_mult(width, 576), 576) for width in (256, 1024, 1536)]
    [256, 1024, 1536]
    """
    return 3 * (width - 0.5) / (2 * hidden_size)  # below the multiple: readers round up


def read_width(factor: float, hidden_size: int) -> int:
    """Returns the width that readers compute from ``ffn_mult``.

    >>> read_width(5.25, 8192)
    28672
    """
    width = int(2 * factor * hidden_size / 3)
    return width + -width % STEP


def _heads(model: Any) -> list[tuple[int, int]]:
    """Returns the numbers of query heads and key-value heads of each layer."""
    layers: Any = find_layers(model)
    attentions = [layer.self_attn for layer in layers]
    return [(one.q_proj.out_features // one.head_dim, one.k_proj.out_features // one.head_dim) for one in attentions]


def _lacks(layer: Any) -> bool:
    """Returns whether a layer has no attention or no MLP."""
    projections = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    modules = dict(layer.named_modules())
    return any(name not in modules for name in projections)
