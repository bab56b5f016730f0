"""Export to GGUF, the file format of llama.cpp: one file with weights, hyperparameters and tokenizer.

Equal layers are written in the family's own architecture. Layers that differ in width or in heads are written in an
architecture whose hyperparameters stock llama.cpp reads per layer.
"""

from hfprune.io.gguf.export import GGUF_TYPES, check_gguf, check_gguf_target, export_gguf, is_own_gguf
from hfprune.io.gguf.families import FAMILIES, Family

__all__ = ["FAMILIES", "GGUF_TYPES", "Family", "check_gguf", "check_gguf_target", "export_gguf", "is_own_gguf"]
