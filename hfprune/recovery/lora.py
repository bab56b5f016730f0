"""LoRA recovery through PEFT (Hu et al., 2021, arXiv:2106.09685), with the settings of HFPrune as defaults."""

import hashlib
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfprune.models.groups import find_spec
from hfprune.models.sublayers import NoMLP, missing_sublayers
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads a default's __dict__
class LoraRecovery:
    """Low-rank adapters on the pruned model, whose other weights are frozen.

    Attributes:
        rank: Rank r of the adapters.
        alpha: Scale of the update alpha / r * B A.
        dropout: Dropout on the adapters' input, in [0, 1).
        target_modules: Names of the adapted projections; None for all linear projections of a layer (seven in Llama, as
            in the HFPrune paper).
        rslora: Whether to scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023, arXiv:2312.03732).
        dora: Whether to train the magnitude of every weight column separately from its direction (DoRA, Liu et al.,
            2024, arXiv:2402.09353). Not supported under FSDP2.
        init: ``default``: adapters start at zero. ``pissa``: adapters start as the ``rank`` largest singular components
            of the weight, which are subtracted from the base (PiSSA, Meng et al., 2024, arXiv:2404.02948), so that the
            base without adapters is not the pruned model. Not supported under FSDP2.

    Example:
        >>> LoraRecovery(rank=16, alpha=32.0).to_dict()["rank"]
        16
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    target_modules: list[str] | None = None
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa"] = "default"

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for values out of range."""
        if self.rank < 1:
            raise ConfigError(f"LoraRecovery: rank={self.rank} must be at least 1.")
        if self.alpha <= 0:
            raise ConfigError(f"LoraRecovery: alpha={self.alpha} must be positive.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoraRecovery: dropout={self.dropout} must be at least 0 and less than 1.")
        if self.init not in ("default", "pissa"):
            raise ConfigError(f"init='{self.init}' is not one of default, pissa.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, for checkpoints and reports."""
        return asdict(self)


def add_lora(model: Any, lora: LoraRecovery, *, seed: int = 0) -> Any:
    """Returns ``model`` wrapped by PEFT, with new adapters (B = 0) as its only trainable weights.

    The initial weights of an adapter depend on ``seed`` and its name (with ``pissa``, on the weights), not on the state
    of a random number generator. They are therefore equal on every rank and in a resumed run.

    Args:
        model: The pruned Hugging Face model.
        lora: Settings of the adapters.
        seed: Seed of the initial weights.

    Raises:
        ConfigError: See :func:`check_lora`, or the weights are unsuitable for DoRA or PiSSA.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    from hfprune.recovery.adapters import PrunedPeftModel

    if (lora.dora or lora.init == "pissa") and any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            "`dora` and init='pissa' require unsharded weights and cannot be used under FSDP2: remove both settings."
        )
    if lora.init == "pissa" and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ConfigError("init='pissa' does not support float64 weights: set dtype='float32'.")
    targets = check_lora(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="pissa" if lora.init == "pissa" else True,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=any(_is_conv1d(module) for module in model.modules()),
    )
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    wrapped.__class__ = PrunedPeftModel  # type: ignore[assignment]  # saves adapters together with their base
    if lora.init == "default":
        _initialise(wrapped, seed)
    else:  # PEFT would subtract the components from the saved base again when it loads the adapters
        config.init_lora_weights = True
    return wrapped


def check_lora(model: nn.Module, lora: LoraRecovery) -> list[str]:
    """Returns the names of the projections to adapt: suffixes, or full names if some of these modules were removed.

    Args:
        model: A Hugging Face model without adapters, possibly on the meta device.
        lora: Settings of the adapters.

    Raises:
        ConfigError: A target matches no projection of the model, or is the output head, which the chunked losses apply
            as a plain matrix.
    """
    spec = find_spec(model)
    names = [name for name, module in model.named_modules() if _is_projection(module) and name != spec.lm_head]
    targets = list(lora.target_modules or spec.lora_targets)
    lacks = bool(missing_sublayers(model, spec)) and lora.target_modules is None
    if lacks:  # no layer may be left with some of the projections
        targets = [target for target in targets if any(_matches(name, target) for name in names)] or targets
    for target in targets:
        if spec.lm_head == target or spec.lm_head.endswith("." + target):
            raise ConfigError(f"LoRA target '{target}' is the output head, which cannot be adapted: remove it.")
        if not any(_matches(name, target) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(f"LoRA target '{target}' matches no projection of the model. It has: {', '.join(known)}.")
    found = [name for name in names if any(_matches(name, target) for target in targets)]
    replaced = [name for name, module in model.named_modules() if isinstance(module, nn.Identity | NoMLP)]
    return found if any(_matches(name, target) for name in replaced for target in targets) else targets


def _matches(name: str, target: str) -> bool:
    """Returns whether PEFT adapts the module ``name`` for a target."""
    return name == target or name.endswith("." + target)


def _initialise(model: nn.Module, seed: int) -> None:
    """Sets every adapter to PEFT's default initial weights: A uniform in +-1/sqrt(inputs), B zero."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        for adapter in layer.active_adapters:
            a: Any = layer.lora_A[adapter]
            b: Any = layer.lora_B[adapter]
            values = torch.empty(a.weight.shape).uniform_(-1, 1, generator=generator) / a.weight.shape[1] ** 0.5
            for projection, value in ((a, values), (b, torch.zeros(b.weight.shape))):
                device = "cpu" if projection.weight.is_meta else projection.weight.device
                projection.weight = nn.Parameter(value.to(device, projection.weight.dtype))


def merge_lora(model: Any) -> Any:
    """Merges the adapters into the weights, in place, and returns the model without the PEFT wrapper."""
    return model.merge_and_unload(progressbar=False)


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
