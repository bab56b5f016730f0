"""Functional API: score, plan, prune, refit, save and load a model without a Trainer.

Scores are plain tensors, one per group of units, such as the neurons of an MLP. A plan can also be made from
user-defined indices:

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> _ = torch.manual_seed(0)
>>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
...                      num_attention_heads=4, num_key_value_heads=2)
>>> model = LlamaForCausalLM(config).eval()
>>> batches = [torch.randint(32, (2, 8)) for _ in range(2)]
>>> scores = score(model, batches)
>>> {name: tuple(tensor.shape) for name, tensor in scores.items()}
{'model.layers.0.mlp': (24,), 'model.layers.1.mlp': (24,)}
>>> plan = make_plan(model, keep={name: tensor.topk(18).indices for name, tensor in scores.items()})
>>> apply_plan(model, plan)
>>> model.config.intermediate_size
18
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.allocation import Allocation, kept_units
from hfprune.compensation import Compensation, LeastSquares
from hfprune.criteria import (
    ActivationTaylor,
    CalibratedCriterion,
    Criterion,
    LayerwiseCriterion,
    WeightCriterion,
    check_experts,
    resolve_objective,
    scored_groups,
    with_layers,
)
from hfprune.io.layouts import apply_plan
from hfprune.io.layouts.per_layer import cut_of, is_per_layer
from hfprune.io.load_any import load
from hfprune.io.recorded_plan import recorded_plan
from hfprune.io.save import export_model
from hfprune.models import class_name, config_values, find_groups
from hfprune.models.skip_layers import SkipLayers, SkipPatterns
from hfprune.objectives import OBJECTIVES
from hfprune.plan import DEPTH_KINDS, UNIT_KINDS, Budget, Group, PruningPlan, UnitKind
from hfprune.pruning.accumulator import check_criterion, weight_scores
from hfprune.pruning.calibration import Calibration, CalibrationData, Scorer
from hfprune.pruning.communicator import LocalCommunicator
from hfprune.pruning.layerwise import check_layerwise, run_layerwise
from hfprune.pruning.options import CalibrationOptions, DepthScores, DepthSetting
from hfprune.pruning.prunable import PrunableModel
from hfprune.pruning.removal_scores import measured_depth
from hfprune.utils.errors import ConfigError, HFPruneError, PlanError
from hfprune.utils.versions import versions

__all__ = ["apply_plan", "load", "make_plan", "refit", "save", "score"]


def score(
    model: Any,
    batches: Iterable[Any] = (),
    criterion: Criterion | None = None,
    *,
    objective: str | None = None,
    units: Sequence[UnitKind] = ("mlp",),
    depth_scores: DepthSetting = None,
    exact: bool = True,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Returns the importance scores of the units of a model, which is not changed.

    The scores are bitwise equal to those of ``PruneTrainer.prune`` for the same batches.

    Args:
        model: A supported Hugging Face causal LM, on any device.
        batches: Calibration batches: token ids [B, T], or mappings with ``input_ids`` [B, T] and optionally
            ``attention_mask`` and ``labels`` [B, T]. Not needed by criteria of the weights.
        criterion: The criterion; ``ActivationTaylor()`` if not given.
        objective: Name of the differentiated objective; that of the criterion, or ``entropy``, if not given.
        units: Unit kinds to score, for example ``("mlp", "heads")``.
        depth_scores: How whole layers and sub-layers are scored: ``kl``, ``cross_entropy``, ``perplexity`` or
            ``cosine`` of the model without each one, on 16 sequences (:class:`hfprune.pruning.options.DepthScores`).
            None: the sum of the criterion's scores of their units.
        exact: Whether sequences run one at a time, so that scores do not depend on batch size and padding. False is
            faster.
        progress: Whether to show a progress bar.

    Returns:
        Group name -> scores [U], float64, on the CPU. Units with low scores are removed first.

    Raises:
        ConfigError: The criterion does not support these units or the objective, or scores layer by layer.
        CalibrationError: The batches have no tokens, or a score is not finite.
        UnsupportedArchitectureError: The model's class is unknown.

    Example:
        >>> from hfprune.criteria import Magnitude
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))
        >>> score(model, criterion=Magnitude(), units=("mlp", "heads"))["model.layers.0.self_attn"].shape
        torch.Size([2])
    """
    criterion = criterion or ActivationTaylor()
    name = resolve_objective(criterion, objective)
    check_experts(criterion, units)
    if isinstance(criterion, LayerwiseCriterion):
        raise ConfigError(
            f"criterion={type(criterion).__name__} scores each layer after the previous layers were pruned, and has no "
            "scores of the dense model. Prune with StructuredPruningCallback or TaylorImportanceCallback."
        )
    subject = PrunableModel(model, units, objective=OBJECTIVES.get(name or "entropy"))
    every, depth = subject.groups(model), DepthScores.of(depth_scores)
    twice = depth is not None and not isinstance(batches, Tensor | Mapping)
    data = _data(list(batches) if twice else batches)
    if depth is None:
        return _unit_scores(subject, every, criterion, data, exact=exact, progress=progress)
    groups = tuple(group for group in every if group.kind not in DEPTH_KINDS)
    found = _unit_scores(subject, groups, criterion, data, exact=exact, progress=progress) if groups else {}
    found |= measured_depth(subject, every, depth, data, LocalCommunicator(), progress=progress)
    return {group.name: found[group.name] for group in every}


def _unit_scores(
    subject: PrunableModel,
    groups: tuple[Group, ...],
    criterion: Criterion,
    data: CalibrationData,
    *,
    exact: bool,
    progress: bool,
) -> dict[str, Tensor]:
    """Returns the scores of the units of some groups by a criterion."""
    model = subject.model
    check_criterion(model, groups, criterion)
    scored = scored_groups(model, groups, criterion)
    if isinstance(criterion, WeightCriterion):
        return with_layers(weight_scores(model, scored, criterion), groups, scored)
    assert isinstance(criterion, CalibratedCriterion)
    options = CalibrationOptions(exact=exact, check_every=None, checkpoint_every=None)
    scorers = [Scorer(criterion, scored)]
    calibration = Calibration(subject, scorers, data, options, LocalCommunicator(), progress=progress)
    return with_layers(calibration.run().scores(), groups, scored)


def make_plan(
    model: Any,
    scores: Mapping[str, Tensor] | None = None,
    *,
    budget: Budget | float | None = None,
    units: Sequence[UnitKind] | None = None,
    allocation: Allocation | None = None,
    keep: Mapping[str, Any] | None = None,
    skip_layers: SkipLayers | SkipPatterns | None = None,
) -> PruningPlan:
    """Returns a pruning plan from scores and a budget, or from user-defined indices.

    Args:
        model: The dense model; only its shapes are read.
        scores: Group name -> scores [U], from :func:`score` or user-defined.
        budget: A :class:`hfprune.Budget`, or the share of all parameters to remove, in (0, 1). Not used with ``keep``,
            or with an allocation that sets the widths itself.
        units: Unit kinds to prune; those of ``scores`` or ``keep`` if not given.
        allocation: Distribution of the budget over groups; the same share of every group if not given.
        keep: Group name -> indices of the kept units, in any order, instead of scores and budget. Other groups keep all
            units.
        skip_layers: Layers and modules that keep all units, such as ``[0, -1]``, ``"0-3"`` or ``"*.self_attn"``; or a
            :class:`hfprune.SkipLayers`.

    Returns:
        The plan for :func:`apply_plan`; ``plan.keep`` holds the kept units of every group.

    Raises:
        ConfigError: The budget is impossible, scores are missing, or arguments are mutually exclusive.
        PlanError: ``keep`` contains a unit that the model does not have.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        >>> plan = make_plan(model, keep={"model.layers.0.mlp": range(12)})
        >>> plan.widths()
        {'model.layers.0.mlp': 12, 'model.layers.1.mlp': 24}
    """
    named = keep if keep is not None else scores or {}
    subject = PrunableModel(model, units or _units_of(model, named), skip_layers=SkipLayers.of(skip_layers))
    groups = subject.groups(model)
    if unknown := sorted(set(named) - {group.name for group in groups}):
        raise ConfigError(
            f"{'scores' if keep is None else 'keep'} has an unknown group '{unknown[0]}'. Groups of these units are "
            f"{', '.join(group.name for group in groups[:3])}, ..."
        )
    provenance: dict[str, Any] = {"units": list(subject.units), "model": subject.describe(), "versions": versions()}
    if keep is not None:
        if budget is not None or allocation is not None or skip_layers is not None:
            raise ConfigError("keep=... lists the kept units: remove budget, allocation and skip_layers.")
        kept = {group.name: keep.get(group.name, range(group.num_units)) for group in groups}
    else:
        kept, found = _within_budget(subject, groups, dict(scores or {}), budget, allocation)
        provenance |= found
    outline = PruningPlan(model_class=class_name(model), groups=groups, keep=kept, config={}, provenance=provenance)
    config = config_values(model, groups, outline.keep)
    return PruningPlan(
        model_class=outline.model_class, groups=groups, keep=outline.keep, config=config, provenance=provenance
    )


def _within_budget(
    subject: PrunableModel,
    groups: tuple[Group, ...],
    scores: dict[str, Tensor],
    budget: Budget | float | None,
    allocation: Allocation | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the kept units, and the provenance of the budget."""
    if allocation is not None and allocation.measures:
        raise ConfigError(
            f"allocation={type(allocation).__name__}() requires measurements: pass {allocation.measures} to it."
        )
    if budget is None and allocation is not None and allocation.own_budget:
        budget = Budget(allocated=True)
    if budget is None:
        raise ConfigError("budget=... is missing: set it to the share of parameters to remove or to a Budget.")
    asked = budget if isinstance(budget, Budget) else Budget(pruning_ratio=budget)
    for group in groups:
        if group.name not in scores:
            raise ConfigError(f"scores has no entry for {group.name}: score the model with the same units.")
        if tuple(scores[group.name].shape) != (group.num_units,):
            shape = list(scores[group.name].shape)
            raise ConfigError(f"scores['{group.name}'] has shape {shape}, expected [{group.num_units}].")
    plain = {name: torch.as_tensor(found).detach().double().cpu() for name, found in scores.items()}
    if bad := next((name for name, found in plain.items() if bool(found.isnan().any())), None):
        raise ConfigError(f"scores['{bad}'] contains NaN.")
    resolved = subject.resolve(asked, allocation, plain)
    described = None if allocation is None else allocation.describe()
    return dict(kept_units(plain, groups, resolved)), {
        "budget": resolved.to_dict(),
        "allocation": described,
        "skip_layers": subject.describe_skipped(),
    }


def _units_of(model: Any, named: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the unit kinds of the named groups, or MLP neurons if there are none."""
    found: list[str] = []
    for kind in UNIT_KINDS:
        try:
            groups = find_groups(model, (kind,))
        except HFPruneError:  # the model has no units of this kind
            continue
        if any(group.name in named for group in groups):
            found.append(kind)
    return tuple(found) or ("mlp",)


def refit(
    model: Any,
    plan: PruningPlan,
    batches: Iterable[Any],
    compensation: Compensation | None = None,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Refits the weights of the kept units to compensate for the removed units, layer by layer and in place.

    Call this function between :func:`make_plan` and :func:`apply_plan`. The model remains dense; the weights of removed
    units are set to zero. Modules that ``skip_layers`` named stay as they are.

    Args:
        model: The dense model.
        plan: The plan.
        batches: Calibration batches, see :func:`score`.
        compensation: Method of the fit; ``LeastSquares()`` if not given.
        progress: Whether to show a progress bar.

    Returns:
        Group name -> relative squared error of the projection's output after the fit.

    Raises:
        ConfigError: The units of the plan cannot be refitted.
        PlanError: The model is not the dense model of the plan.
        CalibrationError: The batches have no tokens.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> plan = make_plan(model, keep={"model.layers.0.mlp": range(20)})
        >>> list(refit(model, plan, [torch.randint(32, (2, 16))]))
        ['model.layers.0.mlp']
        >>> apply_plan(model, plan)
    """
    compensation = compensation or LeastSquares()
    subject = PrunableModel(model, _units_of(model, plan.keep))
    if subject.groups(model) != plan.groups:
        raise PlanError("plan=... describes another model than model=...: call refit before apply_plan.")
    check_layerwise(subject, ActivationTaylor(), compensation)
    skipped = (plan.provenance.get("skip_layers") or {}).get("groups", ())
    result = run_layerwise(
        subject,
        tuple(group for group in plan.groups if group.name not in skipped),
        plan.widths(),
        _data(batches),
        LocalCommunicator(),
        keep=plan.keep,
        compensation=compensation,
        progress=progress,
    )
    return result.errors


def save(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    plan: PruningPlan | None = None,
    layout: str = "uniform",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a pruned model to a folder, and compares the files with the model in memory.

    Args:
        model: The pruned model, without adapters.
        folder: The model folder. It must not exist or be empty, unless ``overwrite`` is set.
        tokenizer: Tokenizer to save with the model, or None.
        plan: Pruning plan, saved as ``plan.json``. If not given, the plan that was applied last, or a plan that keeps
            all units.
        layout: ``uniform`` (loads with stock transformers), ``per_layer`` (loads with :func:`load`), ``padded`` or
            ``bitmask``, see :func:`hfprune.io.save.export_model`.
        overwrite: Whether to replace a model written by hfprune.

    Returns:
        Parameters, widths and bytes measured on the files, and the largest difference of logits after reloading.

    Raises:
        ConfigError: The layout cannot express the model, or ``folder`` may not be replaced; nothing was written.
        OutputError: Writing failed, or the files do not hold the model in memory; ``folder`` is unchanged.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> apply_plan(model, make_plan(model, keep={"model.layers.0.mlp": range(20)}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder)["width"], load(folder).config.intermediate_size
        (20, 20)
    """
    return export_model(model, tokenizer, plan or _own_plan(model), folder, layout=layout, overwrite=overwrite)


def _own_plan(model: Any) -> PruningPlan:
    """Returns the last plan of a pruned model, or a plan that keeps all units."""
    if is_per_layer(model.config):
        return cut_of(model.config).plans[-1]
    return recorded_plan(model) or make_plan(model, keep={})


def _data(batches: Iterable[Any]) -> CalibrationData:
    """Returns batches, or a single batch, as calibration data."""
    found = [batches] if isinstance(batches, Tensor | Mapping) else batches
    return CalibrationData(batches=lambda: found)
