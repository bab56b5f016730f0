"""Exports of tiny models whose layers differ, and their logits and greedy tokens as hfprune computes them."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import hfprune
from hfprune.io.save import export_model
from hfprune.publishing.engine_check import greedy
from tests.helpers.models import HEADED, MIXTURES, configs, mixtures, tiny_tokenizer

PROMPTS = ([3, 9, 27, 5], [40, 8, 8, 21, 33, 4, 19], [11, 50])
"""Token ids, none of them special."""


@dataclass
class Export:
    """A folder, and what the model in it computes."""

    folder: Path
    logits: list[list[float]]
    """Logits after each prompt, [3, V]."""
    tokens: list[list[int]]
    """Greedy continuations, [3, N]."""


def cut(model, *, widths=(), heads=(), experts=(), without=()):
    """Cuts a model, and returns the plan.

    Args:
        model: A tiny model.
        widths: Kept neurons of each layer.
        heads: Kept key-value heads of each layer.
        experts: Kept experts of each layer.
        without: Removed layers.
    """
    units = {"mlp": widths, "heads": heads, "experts": experts}
    keep, num = {}, model.config.num_hidden_layers
    for kind in [kind for kind, counts in units.items() if counts]:
        groups = hfprune.models.find_groups(model, (kind,))
        keep |= {group.name: range(count) for group, count in zip(groups, units[kind], strict=True)}
    if without:
        (group,) = hfprune.models.find_groups(model, ("layers",))
        keep[group.name] = [index for index in range(num) if index not in without]
    plan = hfprune.make_plan(model, keep=keep)
    hfprune.apply_plan(model, plan)
    return plan


def export(config, folder, *, layout="per_layer", new_tokens=8, **units):
    """Exports a random model of ``config``, cut by :func:`cut`, and returns what it computes in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    export_model(model, tiny_tokenizer(), cut(model, **units), folder, layout=layout)
    return read(folder, new_tokens)


def read(folder, new_tokens=8):
    """Returns what :func:`hfprune.load` computes from a folder."""
    model = hfprune.load(folder, dtype="float32").eval()
    found = Export(Path(folder), [], [])
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found.logits.append(model(input_ids=ids).logits[0, -1].tolist())
        found.tokens.append(greedy(model, prompt, new_tokens).argmax(-1).tolist())
    return found


SMALL = {
    **{f"{name}_widths": (name, {"widths": (11, 7, 18)}) for name in sorted(configs())},
    **{f"{name}_heads": (name, {"heads": None}) for name in HEADED if name != "llama_mqa"},
    **{f"{name}_experts": (name, {"experts": (4, 3, 5)}) for name in MIXTURES},
    "llama_all": ("llama", {"widths": (11, 7, 18), "heads": (1, 2, 2), "without": (1,)}),
    "gemma3_all": ("gemma3", {"widths": (11, 7, 18), "heads": (2, 2, 1), "without": (0,)}),
}
"""Name -> tiny model, and what is left of its layers."""


def small(name, folder):
    """Exports a model of ``SMALL``."""
    tiny, units = SMALL[name]
    config = (configs() | mixtures())[tiny]
    config.vocab_size = 64
    if "heads" in units and units["heads"] is None:
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        units = {"heads": (kv // 2, kv, kv // 2)}
    return export(config, folder, **units)


LARGE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Sizes that engines accept: heads of 32 numbers, see :func:`servable`."""


def servable():
    """Name -> config of models that engines accept."""
    own = LARGE | {"head_dim": 32}
    full = LARGE | {"hidden_size": 128}
    return {
        "llama": LlamaConfig(**own, rope_parameters={"rope_type": "default", "rope_theta": 77777.0}),
        "mistral": MistralConfig(**own, sliding_window=None),
        "qwen2": Qwen2Config(**full, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**own),
        "gemma3": Gemma3TextConfig(**own, sliding_window=16, query_pre_attn_scalar=32),
        "phi3": Phi3Config(**full),
    }


def run_script(python, script, arguments, *, path="", **environment):
    """Runs a script in another python and returns the object on its last line.

    ``hfprune`` cannot be imported there, unless ``path`` names it.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(path), **environment}
    command = [str(python), "-c", script, json.dumps(arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def difference(found, expected):
    """Returns the largest difference of logits, relative to the largest logit."""
    one, other = torch.tensor(found), torch.tensor(expected)
    return float((one - other).abs().max() / other.abs().max())
