"""Recorded plan: a model that was pruned in memory knows its plan, and its ``save_pretrained`` writes ``plan.json``.

Only the pruned instance is changed: an object in the place of its ``save_pretrained`` calls the method of its class and
writes the plan next to the weights. It survives pickling and ``copy.deepcopy``. The classes of transformers stay as
they are.
"""

import weakref
from pathlib import Path
from typing import Any

from hfprune.plan import PLAN_FILE, PruningPlan

_HOOK = "save_pretrained"


class PlanWriter:
    """The ``save_pretrained`` of one pruned model.

    Args:
        model: The model; referred to weakly, so that it is freed as soon as nothing else holds it.
        plan: What was pruned.
    """

    def __init__(self, model: Any, plan: PruningPlan) -> None:
        self._model, self.plan = weakref.ref(model), plan

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as the model's class does, and writes ``plan.json`` on the main process.

        Args:
            save_directory: The folder.
            args: Other arguments of the class's ``save_pretrained``; the first is ``is_main_process``.
            kwargs: The same by name.
        """
        model: Any = self._model()
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        main = args[0] if args else kwargs.get("is_main_process", True)
        if main and Path(save_directory).is_dir():
            self.plan.save(Path(save_directory) / PLAN_FILE)

    def __getstate__(self) -> dict[str, Any]:
        """Returns model and plan; a weak reference has no state of its own."""
        return {"model": self._model(), "plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores model and plan."""
        self._model, self.plan = weakref.ref(state["model"]), state["plan"]


def record_plan(model: Any, plan: PruningPlan) -> None:
    """Makes ``save_pretrained`` of this model write ``plan`` as ``plan.json``; a second plan replaces the first.

    Args:
        model: A Hugging Face model, pruned in memory.
        plan: What was pruned last.
    """
    vars(model)[_HOOK] = PlanWriter(model, plan)


def recorded_plan(model: Any) -> PruningPlan | None:
    """Returns the plan that was applied last to a model in memory; None for a model that was not pruned here."""
    found = vars(model).get(_HOOK)
    return found.plan if isinstance(found, PlanWriter) else None
