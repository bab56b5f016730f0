"""Pruning metrics for the trainer's loggers: removed parameters, kept widths and the cost of calibration."""

from collections import defaultdict

from lightning import Trainer

from hfprune.plan import SUBLAYERS, PruningPlan


def pruning_metrics(
    plan: PruningPlan, *, before: int, after: int, calibration_seconds: float | None = None
) -> dict[str, float]:
    """Returns the metrics of a pruned model by their names in loggers.

    Args:
        plan: The applied plan.
        before: Number of parameters of the dense model.
        after: Number of parameters of the pruned model.
        calibration_seconds: Time from the first calibration batch to the plan, in seconds.

    Returns:
        ``pruning/params_before``, ``pruning/params_after`` and ``pruning/removed_share``. For each unit kind,
        ``pruning/KIND_kept_share`` and, except for sub-layers, the minimum, mean and maximum of the kept units per
        group (layer) as ``pruning/KIND_width_min``, ``_mean`` and ``_max``. With calibration,
        ``pruning/calibration_seconds`` and ``pruning/calibration_tokens``. With sparse pruning, ``pruning/zero_share``.

    >>> from hfprune.plan import Group
    >>> groups = tuple(Group(name=str(i), kind="mlp", num_units=8, slices=()) for i in range(2))
    >>> plan = PruningPlan(model_class="M", groups=groups, keep={"0": range(4), "1": range(6)}, config={})
    >>> pruning_metrics(plan, before=100, after=75)["pruning/removed_share"]
    0.25
    >>> [pruning_metrics(plan, before=100, after=75)[f"pruning/mlp_width_{name}"] for name in ("min", "mean", "max")]
    [4.0, 5.0, 6.0]
    """
    found = {"params_before": float(before), "params_after": float(after), "removed_share": 1 - after / before}
    widths: dict[str, list[int]] = defaultdict(list)
    dense: dict[str, int] = defaultdict(int)
    absent = plan.absent()
    for group in plan.groups:
        widths[group.kind] += [len(plan.keep[group.name])] if group.name not in absent else []
        dense[group.kind] += group.num_units
    for kind, kept in widths.items():
        found[f"{kind}_kept_share"] = sum(kept) / dense[kind]
        if kind in SUBLAYERS or not kept:
            continue
        found |= {f"{kind}_width_min": float(min(kept)), f"{kind}_width_mean": sum(kept) / len(kept)}
        found[f"{kind}_width_max"] = float(max(kept))
    calibration = plan.provenance.get("calibration")
    if calibration and calibration_seconds is not None:
        found["calibration_seconds"] = calibration_seconds
        if calibration.get("tokens") is not None:
            found["calibration_tokens"] = float(calibration["tokens"])
    if "sparsity" in plan.provenance:
        found["zero_share"] = float(plan.provenance["sparsity"]["achieved"])
    return {f"pruning/{name}": value for name, value in found.items()}


def log_pruning(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Logs pruning metrics to all loggers of ``trainer`` at the current step."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
