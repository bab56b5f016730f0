"""LoRA recovery through PEFT (Hu et al., 2021, arXiv:2106.09685), with the settings of HFPrune as defaults."""

import hashlib
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfprune.models.groups import find_spec
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads a default's __dict__
class LoraRecovery:
    """Low-rank adapters on the pruned model; everything else stays frozen.

    Attributes:
        rank: Rank r of the adapters.
        alpha: Scale: the update is alpha / r * B A.
        dropout: Dropout on the adapters' input, in [0, 1).
        target_modules: Names of the adapted projections; None adapts every linear projection of a layer (the seven of
            a Llama layer, as in the paper).
        rslora: Scale by alpha / sqrt(r) in place of alpha / r (Kalajdzievski, 2023).
        dora: Train the size of every weight column beside the direction that the adapter changes (DoRA, Liu et al.,
            2024). Needs whole weights: not under FSDP2.
        init: ``default``: the adapter starts at zero. ``pissa``: it starts as the ``rank`` largest singular directions
            of the weight, which keeps the rest (PiSSA, Meng et al., 2024); base and adapter together are the pruned
            model, the base alone is not. Needs whole weights, too.
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
    """Returns ``model`` wrapped by PEFT, with fresh adapters (B = 0: outputs unchanged) as its only trainable weights.

    The first weights of an adapter follow from ``seed`` and the adapter's name (``pissa``: from the weights), not from
    the state of a random number generator: a resumed run, and every rank, starts from the same ones.

    Raises:
        ConfigError: See :func:`check_lora`; or the weights are not of a kind that DoRA or PiSSA can start from.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    from hfprune.recovery.adapters import PrunedPeftModel

    if (lora.dora or lora.init == "pissa") and any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            "dora and init='pissa' start from whole weights, which are sharded under FSDP2: remove both settings."
        )
    if lora.init == "pissa" and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ConfigError("init='pissa' needs weights of at most 32 bits, not float64: set dtype='float32'.")
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
        # peft 0.21 asks for an attribute that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    wrapped.__class__ = PrunedPeftModel  # type: ignore[assignment]  # saves adapters together with their base
    if lora.init == "default":
        _initialise(wrapped, seed)
    else:  # PEFT would take directions out of the saved base again when it loads the adapters
        config.init_lora_weights = True
    return wrapped


def check_lora(model: nn.Module, lora: LoraRecovery) -> list[str]:
    """Returns the names of the projections to adapt; ``model`` has no adapters yet, and may be on the meta device.

    Raises:
        ConfigError: A target matches no projection of the model, the message lists what exists; or the output head,
            which the chunked losses apply as the plain matrix that it is.
    """
    spec = find_spec(model)
    names = [name for name, module in model.named_modules() if _is_projection(module) and name != spec.lm_head]
    targets = list(lora.target_modules or spec.lora_targets)
    for target in targets:
        if spec.lm_head == target or spec.lm_head.endswith("." + target):
            raise ConfigError(f"LoRA target '{target}' is the output head, which adapters leave alone: leave it out.")
        if not any(name == target or name.endswith("." + target) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(f"LoRA target '{target}' matches no projection of the model. It has: {', '.join(known)}.")
    return targets


def _initialise(model: nn.Module, seed: int) -> None:
    """Gives every adapter PEFT's default first weights: A uniform in +-1/sqrt(inputs), B zero."""
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
    """Returns the plain model with its adapters merged into the weights (in place: the wrapper is spent)."""
    return model.merge_and_unload(progressbar=False)


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
