"""Adapters of a pruned model, saved together with their base model.

PEFT's ``save_pretrained`` would refer to the dense model as the base, whose shapes do not fit. ``PrunedPeftModel``
refers to the pruned model, and saves it if necessary.
"""

from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM

from hfprune.models.transformers4 import write_both_forms
from hfprune.plan import PLAN_FILE, PruningPlan

BASE_FOLDER = "base"
"""Subfolder of the adapters to which ``save_pretrained`` writes the pruned base."""

_EMBEDDINGS = 3  # position of save_embedding_layers in PEFT's arguments after the folder

_CARD = """---
library_name: peft
pipeline_tag: text-generation
tags:
- hfprune
- lora
---

# LoRA adapters of a pruned {model_class}

These adapters belong to the pruned model in `{relative}`. They do not fit the dense model{dense}.

{facts}
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
```

`adapter_config.json` holds the absolute path of the pruned model, since PEFT looks for a relative one in the working
directory. After both folders were moved or copied together, also to another machine:

```python
import hfprune

model = hfprune.load("{folder}")  # finds the pruned model in `{relative}`
model.save_pretrained("{folder}")  # writes its new path, so that AutoPeftModelForCausalLM finds it again
```
"""


class PrunedPeftModel(PeftModelForCausalLM):
    """PEFT model of a pruned base model, which is saved with the adapters.

    Attributes:
        plan: The pruning plan, or None if it is unknown.
        base_folder: Folder of a separately saved base. If None, ``save_pretrained`` saves the base below the adapters.
    """

    plan: PruningPlan | None = None
    base_folder: Path | None = None

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Writes the adapters, a model card, and the pruned base with its plan.

        Args:
            save_directory: Folder for the adapters; the base is written to its subfolder ``base``.
            args: Further positional arguments of PEFT.
            kwargs: Further keyword arguments of PEFT.
        """
        folder = Path(save_directory)
        base = self.base_folder or folder / BASE_FOLDER
        main = kwargs.get("is_main_process", True)
        if self.base_folder is None and main:
            self._save_base(base)
        if len(args) < _EMBEDDINGS:
            kwargs.setdefault("save_embedding_layers", False)  # the base holds them, and PEFT would search for it
        config, name = self.peft_config[self.active_adapter], self.base_name
        config.base_model_name_or_path = str(base.absolute())
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            config.base_model_name_or_path = name
        if main:
            (folder / "README.md").write_text(self._card(folder, base), encoding="utf-8")

    @property
    def base_name(self) -> str | None:
        """Name or path of the dense model."""
        name: str | None = getattr(self.get_base_model().config, "_name_or_path", None)
        return name or None

    def _save_base(self, folder: Path) -> None:
        """Writes the model without adapters to a subfolder."""
        base: Any = self.get_base_model()
        state = {k.replace(".base_layer.", "."): v for k, v in base.state_dict().items() if "lora_" not in k}
        base.save_pretrained(folder, state_dict=state)
        if self.plan is not None:
            self.plan.save(folder / PLAN_FILE)
        write_both_forms(folder)

    def _card(self, folder: Path, base: Path) -> str:
        base_model: Any = self.get_base_model()
        relative = BASE_FOLDER if self.base_folder is None else f"../{base.name}"
        parameters = sum(p.numel() for name, p in base_model.named_parameters() if "lora_" not in name)
        config: Any = self.peft_config[self.active_adapter]
        facts = [f"- parameters of the pruned model: {parameters:,}", f"- rank {config.r}, alpha {config.lora_alpha}"]
        provenance = self.plan.provenance if self.plan is not None else {}
        if budget := provenance.get("budget"):
            facts.append(f"- budget: {budget['asked']}")
        if criterion := provenance.get("criterion"):
            facts.append(f"- criterion: {criterion['name']}")
        return _CARD.format(
            model_class=type(base_model).__name__,
            relative=relative,
            dense=f" `{self.base_name}`" if self.base_name else "",
            facts="\n".join(facts) + "\n",
            folder=folder.name if self.base_folder is None else f"{base.parent.name}/adapter",
        )
