"""Checks of a proof: each compares a pruned tiny model with the dense one, and raises ``Failed`` with the reason.

Units are silenced by hooks on the modules that read them, not by the masks of the surgery, which share its table: a
second reader of the units, or a module in between that mixes them, makes the two models differ.

Shape legend: B rows, T tokens, D hidden size, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.contexts import hooked, inference
from hfprune.models.forward import final_hidden, forward_packed
from hfprune.models.groups import (
    backbone,
    find_groups,
    find_spec,
    layer_params,
    parameter_count,
    pin_spec,
    unit_cost,
)
from hfprune.models.output_head import compare_logits, head_of_table
from hfprune.models.proof_silence import silence_stream, silence_units, skip_layers
from hfprune.models.residual_stream import CHANNELS
from hfprune.models.stock_config import check_stock, config_values, head_counts
from hfprune.models.surgery import apply_plan, mask_plan
from hfprune.models.twins import own_class, plain_experts
from hfprune.plan import LAYERS, Group, PruningPlan
from hfprune.utils.errors import UnsupportedArchitectureError

_TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest logit: norms round to float32 within float64 models."""

_SINGLE_TOLERANCE = 1e-3
"""The same for classes that run in float32 only."""


class Failed(Exception):  # noqa: N818  # the outcome of a check, no error
    """A check did not hold; the message is the reason."""


def check_logits(dense: nn.Module) -> None:
    """Checks that the head of the table, on the states of its backbone, gives the logits of the model."""
    ids = token_ids(dense)
    head = head_of_table(dense)
    with inference(dense):
        hidden = backbone(dense)(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        ours = head.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)
    own = logits(dense, ids)
    if ours.shape != own.shape:
        raise Failed(f"the head gives logits {list(ours.shape)}, the model {list(own.shape)}")
    compare_logits(dense, ours, own)


def check_keep_all(dense: nn.Module, kinds: Sequence[str]) -> None:
    """Checks that a plan which keeps all units changes no bit of the logits, and none but the last with channels."""
    for some, exact in (([kind for kind in kinds if kind != CHANNELS], True), (kinds, False)):
        if not some:
            continue
        groups = find_groups(dense, some)
        pruned = logits(_pruned(dense, groups, {group.name: range(group.num_units) for group in groups}))
        _same(pruned, logits(dense), "a plan that keeps all units changes the logits")
        if exact and not torch.equal(pruned, logits(dense)):
            raise Failed("a plan that keeps all units changes the last bits of the logits")


def check_channels_within_layers(dense: nn.Module, groups: Sequence[Group]) -> None:
    """Checks for neurons or heads that removal equals zeros at the inputs of the modules that read them."""
    for seed in (0, 1):
        _compare(dense, groups, _some(groups, seed), silence_units)


def check_experts(dense: nn.Module, groups: Sequence[Group]) -> None:
    """Checks for experts that removal equals routers that choose among the kept ones."""
    for seed in (0, 1):
        keep = _some(groups, seed)
        pruned, masked = _pruned(dense, groups, keep), deepcopy(dense)
        _same_cost(dense, pruned, groups, keep)
        mask_plan(masked, _plan(dense, groups, keep))
        _same(logits(pruned), logits(masked), _differs("experts"))
        _changed(logits(pruned), logits(dense))


def check_layers(dense: nn.Module, groups: Sequence[Group]) -> None:
    """Checks for every layer, and for all but one, that removal equals a layer that returns its input."""
    (group,) = groups
    every = range(group.num_units)
    for keep in [*([i for i in every if i != removed] for removed in every), [0]]:
        _compare(dense, groups, {group.name: keep}, skip_layers)


def check_hidden_channels(dense: nn.Module, groups: Sequence[Group]) -> None:
    """Checks for hidden channels that removal equals zeros wherever the stream is written."""
    for seed in (0, 1):
        _compare(dense, groups, _some(groups, seed), silence_stream)


REMOVALS: Mapping[str, Callable[[nn.Module, Sequence[Group]], None]] = {
    "mlp": check_channels_within_layers,
    "heads": check_channels_within_layers,
    "experts": check_experts,
    LAYERS: check_layers,
    CHANNELS: check_hidden_channels,
}
"""Unit kind -> check that pruned and masked models agree."""


def check_reload(dense: nn.Module, kinds: Sequence[str]) -> None:
    """Checks that a stock config states a model with fewer units: reloaded, it gives the same logits and tokens."""
    groups = find_groups(dense, kinds)
    keep = _uniform(dense, groups)
    try:
        check_stock(dense, groups, keep)
    except UnsupportedArchitectureError as error:
        raise Failed(str(error).partition(". ")[0]) from error
    pruned: Any = _pruned(dense, groups, keep)
    with tempfile.TemporaryDirectory() as folder:
        pruned.config.save_pretrained(folder)
        config = type(pruned.config).from_pretrained(folder)
    stock = own_class(dense)(config).to(next(pruned.parameters()).dtype).eval()
    plain_experts(stock)
    sizes = {name: list(tensor.shape) for name, tensor in stock.state_dict().items()}
    for name, tensor in pruned.state_dict().items():
        if sizes.get(name) != list(tensor.shape):
            raise Failed(f"its config builds {name} as {sizes.get(name, 'nothing')}, not {list(tensor.shape)}")
    stock.load_state_dict(pruned.state_dict())
    pin_spec(stock, find_spec(dense))
    _same(logits(stock), logits(pruned), "the model that its config builds gives other logits")
    cached = {"heads", LAYERS} & set(kinds)  # what a key-value cache depends on
    if cached and _can_decode(dense) and not _decodes(stock):
        raise Failed("step by step, with its key-value cache, the reloaded model gives other logits")


def check_packing(dense: nn.Module) -> None:
    """Checks that packed documents give the states of each document alone, in float32 as attention masks need."""
    dense = deepcopy(dense).float()
    ids = token_ids(dense)[:1]
    positions = torch.cat([torch.arange(5), torch.arange(ids.shape[1] - 5)])[None]
    with inference(dense):
        packed = forward_packed(dense, ids, positions, torch.ones_like(ids))
        alone = [final_hidden(dense, {"input_ids": part})[0] for part in (ids[:, :5], ids[:, 5:])]
    _same(packed, torch.cat(alone, dim=1), "a packed document changes the states of the next one")


def check_padding(dense: nn.Module, side: str) -> None:
    """Checks that padding on one side leaves the states of the other tokens alone, in float32."""
    dense = deepcopy(dense).float()
    ids = token_ids(dense)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    if side == "left":
        mask = mask.flip(1)
    with inference(dense):
        padded, _ = final_hidden(dense, {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})
        alone, _ = final_hidden(dense, {"input_ids": ids[1:][mask[1:].bool()][None]})
    _same(padded[1][mask[1].bool()][None], alone, f"padding on the {side} changes the states of other tokens")


def token_ids(model: Any) -> Tensor:
    """Returns random token ids [2, 12] without special tokens."""
    vocabulary = head_of_table(model).weight.shape[0]
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, min(vocabulary, 89), (2, 12), generator=generator)


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Returns the logits [B, T, V] of a model."""
    with inference(model):
        found: Tensor = model(input_ids=token_ids(model) if ids is None else ids, use_cache=False).logits
    return found


def _same(one: Tensor, other: Tensor, reason: str) -> None:
    limit = _TOLERANCE if one.dtype == torch.float64 == other.dtype else _SINGLE_TOLERANCE
    difference = float((one - other).abs().max() / other.abs().max())
    if not difference <= limit:
        raise Failed(f"{reason}; the largest difference is {difference:.2g} of the largest value")


def _differs(what: str) -> str:
    return f"the model without {what} differs from the model with {what} masked"


def _changed(pruned: Tensor, dense: Tensor) -> None:
    if torch.allclose(pruned, dense, rtol=0, atol=1e-9 * float(dense.abs().max())):
        raise Failed("removing units changes no logit: they are not used")


Keep = Mapping[str, Iterable[int]]
"""Group name -> kept units."""


def _some(groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """Returns random kept units, another number in each group; the first and the last unit are removed once each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, group in enumerate(groups):
        least = min(group.num_units, max(group.least, 1))
        removed = min(max(1, group.num_units // 3 - number % 3), group.num_units - least)
        end = 0 if seed == 0 else group.num_units - 1
        others = [unit for unit in torch.randperm(group.num_units, generator=generator).tolist() if unit != end]
        removed_units = {end, *others[: removed - 1]} if removed else set()
        found[group.name] = [unit for unit in range(group.num_units) if unit not in removed_units]
    return found


def _uniform(dense: Any, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Returns the same number of random kept units for all groups of a kind, one that a stock config may state."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for group in groups:
        fewer = {"mlp": 4, "experts": 1, "heads": 1, LAYERS: 1, CHANNELS: group.num_units // 2}[group.kind]
        kept = max(group.num_units - fewer, group.least, 1)
        if group.kind == "heads":
            kept = max([count for count in head_counts(dense) if count <= kept], default=kept)
        if group.kind == "mlp":
            kept = min(g.num_units for g in groups if g.kind == "mlp") - fewer
        units = torch.randperm(group.num_units, generator=generator)[:kept].tolist()
        found[group.name] = sorted(range(1, group.num_units) if group.kind == LAYERS else units)  # all layers move up
    return found


def _plan(dense: nn.Module, groups: Sequence[Group], keep: Keep) -> PruningPlan:
    kept = {name: tuple(units) for name, units in keep.items()}
    config = config_values(dense, groups, kept)
    return PruningPlan(model_class=find_spec(dense).model_class, groups=tuple(groups), keep=kept, config=config)


def _pruned(dense: nn.Module, groups: Sequence[Group], keep: Keep) -> nn.Module:
    pruned = deepcopy(dense)
    apply_plan(pruned, _plan(dense, groups, keep))
    return pruned


Silence = Callable[[nn.Module, PruningPlan], list[Any]]
"""Registers hooks that silence the removed units of a plan in the dense model; returns their handles."""


def _compare(dense: nn.Module, groups: Sequence[Group], keep: Keep, silence: Silence) -> None:
    """Raises ``Failed`` unless the pruned model gives the logits of the dense one with silenced units."""
    plan, small = _plan(dense, groups, keep), _pruned(dense, groups, keep)
    _same_cost(dense, small, groups, keep)
    pruned = logits(small)
    with hooked(silence(dense, plan)):
        masked = logits(dense)
    kind = groups[0].kind
    _same(pruned, masked, _differs({"mlp": "neurons"}.get(kind, kind)))
    _changed(pruned, logits(dense))


def _same_cost(dense: nn.Module, pruned: nn.Module, groups: Sequence[Group], keep: Keep) -> None:
    """Raises ``Failed`` unless units of one kind cost what the budget counts for them."""
    expected = 0
    for group in groups:
        removed_units = sorted(set(range(group.num_units)) - set(keep[group.name]))
        sizes = layer_params(dense) if group.kind == LAYERS else (unit_cost(dense, group),) * group.num_units
        expected += sum(sizes[unit] for unit in removed_units)
    removed = parameter_count(dense) - parameter_count(pruned)
    if removed != expected:
        raise Failed(f"a budget counts {expected} parameters for units that have {removed}")


def _decodes(model: Any) -> bool:
    """Returns whether the last token, after the others in a key-value cache, gets the logits of one whole pass."""
    ids = token_ids(model)
    whole = logits(model)[:, -1]
    with inference(model):
        cache = model(input_ids=ids[:, :-1], use_cache=True).get("past_key_values")
        if cache is None:
            return False
        step = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    limit = _TOLERANCE if step.dtype == torch.float64 else _SINGLE_TOLERANCE
    return float((step - whole).abs().max() / whole.abs().max()) <= limit


def _can_decode(dense: nn.Module) -> bool:
    """Returns whether the class decodes with a cache at all when called with token ids alone."""
    try:
        return _decodes(dense)
    except Exception:  # the class is foreign code
        return False
