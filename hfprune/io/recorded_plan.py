"""Recorded plan: ``save_pretrained`` of a model that was pruned in memory also writes ``plan.json``.

Only the pruned instance is changed: an attribute ``save_pretrained`` calls the method of the class and writes the plan
to the same folder. It is kept by pickling and ``copy.deepcopy``. The classes of transformers are not changed.
"""

import weakref
from pathlib import Path
from typing import Any

from hfprune.plan import PLAN_FILE, PruningPlan

_HOOK = "save_pretrained"


class PlanWriter:
    """``save_pretrained`` of one pruned model.

    Args:
        model: The model, held by a weak reference.
        plan: The applied plan.
    """

    def __init__(self, model: Any, plan: PruningPlan) -> None:
        self._model, self.plan = weakref.ref(model), plan

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model as its class does, and writes ``plan.json`` in the main process.

        Args:
            save_directory: Output folder.
            args: Other positional arguments of ``save_pretrained``; the first is ``is_main_process``.
            kwargs: Keyword arguments of ``save_pretrained``.
        """
        model: Any = self._model()
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        main = args[0] if args else kwargs.get("is_main_process", True)
        if main and Path(save_directory).is_dir():
            self.plan.save(Path(save_directory) / PLAN_FILE)

    def __getstate__(self) -> dict[str, Any]:
        """Returns model and plan; weak references cannot be pickled."""
        return {"model": self._model(), "plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores model and plan."""
        self._model, self.plan = weakref.ref(state["model"]), state["plan"]


def record_plan(model: Any, plan: PruningPlan) -> None:
    """Makes ``save_pretrained`` of a model write ``plan`` as ``plan.json``, instead of an earlier plan.

    Args:
        model: A Hugging Face model, pruned in memory.
        plan: The plan that was applied last.
    """
    vars(model)[_HOOK] = PlanWriter(model, plan)


def recorded_plan(model: Any) -> PruningPlan | None:
    """Returns the plan that was applied last to a model in memory, or None."""
    found = vars(model).get(_HOOK)
    return found.plan if isinstance(found, PlanWriter) else None
