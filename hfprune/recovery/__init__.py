"""How quality is won back after pruning."""

from hfprune.recovery.distillation import DistillationRecovery
from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora

__all__ = ["DistillationRecovery", "LoraRecovery", "add_lora", "merge_lora"]
