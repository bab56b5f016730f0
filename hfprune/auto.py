"""Registration of hfprune's model types with transformers' Auto classes, by ``import hfprune.auto``.

``AutoConfig``, ``AutoModelForCausalLM`` and libraries built on them (lm-eval, pipelines) then load folders with
``model_type`` ``hfprune`` (layers that differ in width) or ``hfprune_bitmask`` (zeros not stored), without
``trust_remote_code``.
"""

from hfprune.io.layouts.bitmask import BitmaskConfig, BitmaskForCausalLM
from hfprune.io.layouts.per_layer import HFPruneForCausalLM, PerLayerConfig

__all__ = ["BitmaskConfig", "BitmaskForCausalLM", "HFPruneForCausalLM", "PerLayerConfig"]
