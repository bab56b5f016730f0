"""The flags that an unknown one may stand for."""

from collections.abc import Iterable

from hfprune.utils.spelling import nearest

_MEANT = {
    "pruning_ratio": ("ratio", "prune_ratio", "pruning", "prune", "amount", "compression_ratio", "removal_ratio"),
    "pruning_ratios": ("pruning_ratio", "prune_ratios"),
    "sparsity": ("sparsity_ratio", "sparsity_level"),
    "intermediate_size": ("width", "mlp_width", "intermediate_dim", "ffn_size"),
    "model.path": ("model_path", "model_name", "model_name_or_path", "model_id", "pretrained", "base_model", "path"),
    "output_dir": ("output", "out", "out_dir", "save_dir", "save_path", "output_path"),
    "output": ("output_dir", "out", "output_path", "output_file"),
    "data.calibration": ("calibration_data", "calibration_dataset", "calib_data", "dataset"),
}
"""Flag -> names of the same option in other tools."""
_INSTEAD = {"trainer.precision": " Models run in their own type: give --model.dtype."}
"""Flag that a command does not use -> what serves its purpose."""


def meant(name: str, known: Iterable[str]) -> list[str]:
    """Returns the flags that an unknown one may stand for, the most likely first and at most three.

    A misspelling, another tool's name, or the last part of a dotted flag.

    >>> meant("amount", {"pruning_ratio", "mlp_ratio"}), meant("units", {"importance.units", "seed"})
    (['pruning_ratio'], ['importance.units'])
    """
    plain, flags = name.replace("-", "_"), set(known)
    for flag, others in _MEANT.items():
        if plain in others and flag in flags:
            return [flag]
    tails = sorted((flag.count("."), flag) for flag in flags if flag.endswith(f".{plain}"))
    if tails:
        short = [flag for dots, flag in tails if dots == tails[0][0]]
        return short if len(short) <= 3 else []
    near = nearest(plain, flags)
    return [near] if near else []


def guess(*near: str | None) -> str:
    """Returns the question that names what may have been meant, empty where nothing is near."""
    names = " or ".join(f"'{name}'" for name in near if name)
    return f". Did you mean {names}?" if names else ""


def not_used(flag: str, command: str) -> str:
    """Returns the message for a flag of other commands."""
    return f"--{flag} is not used by {command}.{_INSTEAD.get(flag, '')}"
