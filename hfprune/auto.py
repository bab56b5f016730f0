"""``import hfprune.auto``: from then on transformers' Auto classes load models whose layers differ in width.

``AutoConfig``, ``AutoModelForCausalLM`` and what is built on them (lm-eval, pipelines) then read folders with
``model_type`` ``hfprune``, without ``trust_remote_code``. Everything else of hfprune that reads models imports this.
"""

from hfprune.layouts.per_layer import HFPruneConfig, HFPruneForCausalLM

__all__ = ["HFPruneConfig", "HFPruneForCausalLM"]
