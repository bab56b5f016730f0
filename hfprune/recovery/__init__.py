"""How quality is won back after pruning."""

from hfprune.recovery.lora import LoraRecovery, add_lora, merge_lora

__all__ = ["LoraRecovery", "add_lora", "merge_lora"]
