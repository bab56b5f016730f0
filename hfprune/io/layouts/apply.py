"""Application of a plan to a Hugging Face model: surgery, and a config that describes the result."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfprune.io.layouts.base import Cut
from hfprune.io.layouts.per_layer import cut_of, dense_config, finish, is_per_layer, stock_config, to_stock
from hfprune.io.recorded_plan import record_plan
from hfprune.models import find_spec, surgery
from hfprune.models.config_keys import config_value, has_key, set_config_value
from hfprune.plan import PruningPlan


def apply_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Cuts ``model`` in place to the kept units of a plan, and updates its config.

    The config remains a stock config if one value per field can describe the result. Otherwise it becomes a per-layer
    config (:mod:`hfprune.io.layouts.per_layer`). ``save_pretrained`` writes the plan in both cases
    (:mod:`hfprune.io.recorded_plan`).

    Tied weights remain tied. Parameters that shrink are replaced: existing optimizers must be rebuilt.

    Args:
        model: A supported Hugging Face model, or any module whose projections the plan names.
        plan: The kept units of every group.

    Raises:
        PlanError: The plan does not fit the model, which is unchanged.

    Example:
        >>> from hfprune.models import find_groups
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> groups = find_groups(model, ("mlp",))
        >>> keep = {group.name: range(12) for group in groups}
        >>> apply_plan(model, PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={}))
        >>> model.config.intermediate_size, model.model.layers[0].mlp.down_proj
        (12, Linear(in_features=12, out_features=8, bias=False))
    """
    if not isinstance(model, PreTrainedModel):
        surgery.apply_plan(model, plan)
        return
    config: Any = model.config
    dense = dense_config(config)
    before = cut_of(config).plans if is_per_layer(config) else ()
    surgery.apply_plan(model, plan)
    record_plan(model, plan)
    if not_expressed(model) is None:
        to_stock(config)
        return
    plans = (*before, plan)
    values = {key: config_value(dense, key) for made in plans for key in made.config if has_key(dense, key)}
    finish(model, dense, Cut(dense=values, count=len(plans), plans=plans))


def not_expressed(model: Any) -> str | None:
    """Returns why a stock config cannot describe ``model``, or None if it can.

    The shapes that stock transformers would build from the config are compared with those of the model.

    Args:
        model: A Hugging Face model.
    """
    found = shapes(model.state_dict().items())
    try:
        config = stock_config(model.config)
        expected = shapes(empty_copy(model, type(config).from_dict(config.to_dict())).state_dict().items())
    except (ValueError, TypeError, StrictDataclassError) as error:
        return " ".join(str(error).split())
    for name in expected | found:
        if expected.get(name) != found.get(name):
            return f"{name} would be {expected.get(name, 'there')}, it is {found.get(name, 'missing')}"
    return None


def shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[int]]:
    """Returns the shape of every named tensor."""
    return {name: list(tensor.shape) for name, tensor in tensors}


def empty_copy(model: Any, config: Any = None) -> Any:
    """Returns a model of the same class on the meta device, with shapes but no weights.

    Args:
        model: A Hugging Face model.
        config: Stock or per-layer config, which is copied; the config of ``model`` if not given.
    """
    config = copy.deepcopy(model.config if config is None else config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if is_per_layer(config) else type(model)(config)


def pruned_shapes(model: Any, plan: PruningPlan) -> Any:
    """Returns a pruned copy of ``model`` on the meta device; ``model`` itself is not changed."""
    empty = empty_copy(model)
    apply_plan(empty, plan)
    return empty


def run_empty(model: Any, *, tokens: int = 2) -> Any:
    """Runs a model on the meta device and returns its outputs, which have shapes and a cache but no values.

    Two settings of the model are changed permanently, without an effect on shapes: rotary embeddings with
    length-dependent frequencies (``dynamic``, ``longrope``) use the default ones, and experts run batched.

    Args:
        model: A Hugging Face causal LM of a supported class, on the meta device.
        tokens: Sequence length; the batch size is 1.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")
    if find_spec(model).experts is not None:
        model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        return model(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)


def restate_width(model: PreTrainedModel, before: int, after: int) -> str | None:
    """Updates the config of a pruned model of an unknown class to its new MLP width.

    Candidates are the keys with the old width or without a value. A key is accepted if the class then builds the shapes
    of ``model``.

    Args:
        model: A Hugging Face model of any class, after its projections were cut.
        before: Neurons per group of the dense model.
        after: Kept neurons per group.

    Returns:
        None on success, otherwise the reason why no key fits; the config is then unchanged.
    """
    reason, config = not_expressed(model), model.config
    if reason is None:
        return None
    values = config.to_dict().items()
    keys = [key for key, value in values if value is None or (type(value) is int and value == before)]
    for key in sorted(keys, key=lambda key: config_value(config, key, None) is None):
        old = config_value(config, key, None)
        set_config_value(config, key, after)
        if not_expressed(model) is None:
            return None
        set_config_value(config, key, old)
    return reason
