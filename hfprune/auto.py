"""``import hfprune.auto``: from then on transformers' Auto classes load what only hfprune writes.

``AutoConfig``, ``AutoModelForCausalLM`` and what is built on them (lm-eval, pipelines) then read folders with
``model_type`` ``hfprune`` (layers that differ in width) or ``hfprune_bitmask`` (zeros left out), without
``trust_remote_code``. Everything else of hfprune that reads models imports this.
"""

from hfprune.io.layouts.bitmask import BitmaskConfig, BitmaskForCausalLM
from hfprune.io.layouts.per_layer import HFPruneForCausalLM, PerLayerConfig

__all__ = ["BitmaskConfig", "BitmaskForCausalLM", "HFPruneForCausalLM", "PerLayerConfig"]
