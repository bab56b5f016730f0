"""Recovery: training after pruning, of adapters or weights, optionally with distillation from the dense model."""

from hfprune.recovery.distillation import DistillationRecovery
from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora
from hfprune.recovery.mode import RecoveryMode, RecoverySetting

__all__ = ["DistillationRecovery", "LoraRecovery", "RecoveryMode", "RecoverySetting", "add_lora", "merge_lora"]
