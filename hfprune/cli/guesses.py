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
    "data.calibration_sequences": ("nsamples", "n_samples", "num_samples", "num_calibration_samples"),
    "data.recovery": ("train", "train_data", "train_file", "training_data", "recovery_data"),
    "data.seq_len": ("seqlen", "seq_length", "max_seq_len", "max_seq_length", "max_length", "sequence_length"),
    "model.learning_rate": ("lr",),
    "model.dtype": ("torch_dtype", "precision"),
    "model.distillation.alpha": ("kd", "distill", "distillation"),
    "trainer.max_epochs": ("epochs", "num_epochs", "num_train_epochs"),
    "trainer.max_steps": ("steps", "num_steps"),
    "trainer.accelerator": ("device", "gpu", "cuda"),
    "seed_everything": ("seed", "random_seed"),
    "importance.units": ("heads", "attention_heads", "layers", "depth", "neurons", "experts", "channels"),
    "importance.recovery": ("lora", "peft", "adapter"),
    "tasks": ("task", "benchmark", "benchmarks", "zero_shot"),
    "layout": ("format",),
    "ckpt_path": ("resume", "resume_from", "resume_from_checkpoint", "checkpoint"),
    "overwrite": ("force",),
}
"""Flag -> names of the same option in other tools."""
COMMANDS_MEANT = {
    "prune": ("compress", "shrink", "sparsify", "run"),
    "fit": ("train", "finetune", "recover", "retrain", "heal"),
    "evaluate": ("eval", "test", "measure", "perplexity"),
    "sweep": ("compare", "benchmark"),
    "export": ("convert", "save"),
    "plan": ("estimate", "dry_run", "size"),
    "inspect": ("info", "show", "describe"),
    "chat": ("generate", "talk"),
    "push": ("upload", "publish"),
}
"""Command -> words for it in other tools."""
_ADVICE = {
    "dry_run": " 'hfprune plan MODEL' shows what a ratio leaves of a model; it runs nothing.",
    "ppl": " Perplexity is always measured.",
}
"""Unknown flag -> what serves its purpose."""
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


def meant_command(word: str, known: Iterable[str]) -> str | None:
    """Returns the command that an unknown one may stand for: another tool's word, or a misspelling.

    >>> meant_command("eval", ["fit", "evaluate"]), meant_command("prnue", ["prune"]), meant_command("llama", ["prune"])
    ('evaluate', 'prune', None)
    """
    plain, commands = word.lower().replace("-", "_"), list(known)
    found = next((name for name, others in COMMANDS_MEANT.items() if plain in others and name in commands), None)
    return found or nearest(word, commands)


def advice(name: str) -> str:
    """Returns what serves the purpose of an unknown flag in hfprune, empty where nothing is known.

    >>> advice("ppl")
    ' Perplexity is always measured.'
    """
    return _ADVICE.get(name.replace("-", "_"), "")


def guess(*near: str | None) -> str:
    """Returns the question that names what may have been meant, empty where nothing is near."""
    names = " or ".join(f"'{name}'" for name in near if name)
    return f". Did you mean {names}?" if names else ""


def not_used(flag: str, command: str) -> str:
    """Returns the message for a flag of other commands."""
    return f"--{flag} is not used by {command}.{_INSTEAD.get(flag, '')}"
