"""Output heads: created from the architecture table and compared with the model's own logits at first use.

Objectives and metrics apply the head to final hidden states one chunk of tokens at a time, without calling the model. A
table without the logit scale or soft cap of its class would give wrong results without an error.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfprune.models.config_keys import config_value, has_key
from hfprune.models.contexts import inference
from hfprune.models.groups import backbone, find_spec
from hfprune.models.projection import submodule
from hfprune.objectives.output_head import OutputHead
from hfprune.utils.errors import UnsupportedArchitectureError

_CHECKED: WeakSet[nn.Module] = WeakSet()
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 0.05  # the class rounds scaled logits once more, in their dtype
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def output_head(model: nn.Module) -> OutputHead:
    """Returns the output head of ``model`` with its scale and soft cap, sharing the model's weights.

    The first call for a model compares the head with the model's own logits, see :func:`check_head`. Models on the meta
    device and sharded models are not compared here.

    Raises:
        UnsupportedArchitectureError: The head is not an ``nn.Linear``, or its logits differ from those of the model.
    """
    head = head_of_table(model)
    if model not in _CHECKED and _holds_weights(model):
        with _without_hooks(model):
            check_head(model)
    return head


def check_head(model: nn.Module) -> None:
    """Compares the head of ``model``'s table with the model's own logits on four tokens, once per model.

    For a sharded model, all ranks call it on the root module while the FSDP hooks are active.

    Args:
        model: A supported Hugging Face model.

    Raises:
        UnsupportedArchitectureError: The logits differ by more than rounding; the message shows a pair of logits.
    """
    ids = torch.arange(1, 5, device=_device(model)).unsqueeze(0) % head_of_table(model).weight.shape[0]
    with inference(model):
        hidden: Tensor = backbone(model)(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        ours = head_of_table(model).logits(hidden[0])
        own: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
    compare_logits(model, ours, own)
    _CHECKED.add(model)


def compare_logits(model: nn.Module, ours: Tensor, own: Tensor) -> None:
    """Raises unless the logits agree; NaNs are ignored here and reported by the metrics.

    Args:
        model: The model.
        ours: Logits of the head of its table, [..., V].
        own: Logits of the model, of the same shape.

    Raises:
        UnsupportedArchitectureError: They differ by more than rounding; the message shows a pair of logits.
    """
    tolerance = _TOLERANCE if torch.finfo(own.dtype).bits >= 32 else _HALF_TOLERANCE
    ours, own = ours.double(), own.double()
    difference = (ours - own).abs()
    limit = tolerance * torch.maximum(ours.abs().max(), own.abs().max())
    if not bool(difference.max() > limit):
        return
    place = int(difference.argmax())
    spec = find_spec(model)
    raise UnsupportedArchitectureError(
        f"The table of {spec.model_class} does not describe its output head: '{spec.lm_head}' on the states of "
        f"'{spec.backbone}' gives a logit of {float(ours.flatten()[place]):.6g}, but the model gives "
        f"{float(own.flatten()[place]):.6g}. If the class scales its logits, set ArchSpec(scale_key='logit_scale'), "
        "with scale_divides=True for a divisor (Granite's 'logits_scaling'); if it caps them, set "
        "softcap_key='final_logit_softcapping'."
    )


def head_of_table(model: nn.Module) -> OutputHead:
    """Returns the output head that the table of ``model`` describes, without comparing it with the model."""
    spec = find_spec(model)
    config: Any = model.config
    lm_head = submodule(model, spec.lm_head)
    if not isinstance(lm_head, nn.Linear):
        raise UnsupportedArchitectureError(
            f"The output head of this {spec.model_class} is a {type(lm_head).__name__}, not an nn.Linear."
        )
    for key in (spec.softcap_key, spec.scale_key):
        if key is not None and not has_key(config, key):
            raise UnsupportedArchitectureError(
                f"The config of this {spec.model_class} has no '{key}', which its architecture table names."
            )
    softcap = config_value(config, spec.softcap_key) if spec.softcap_key else None
    scale = 1.0 if spec.scale_key is None else float(config_value(config, spec.scale_key))
    return OutputHead.of(lm_head, softcap=softcap, scale=1 / scale if spec.scale_divides else scale)


def _holds_weights(model: nn.Module) -> bool:
    return not any(p.is_meta or isinstance(p, DTensor) for p in model.parameters())


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters())
    return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Context in which all hooks of ``model`` are disabled, so that none of them records the comparison."""
    kept = [(module, name, module.__dict__[name]) for module in model.modules() for name in _HOOKS]
    for module, name, hooks in kept:
        module.__dict__[name] = OrderedDict() if hooks else hooks
    try:
        yield
    finally:
        for module, name, hooks in kept:
            module.__dict__[name] = hooks
