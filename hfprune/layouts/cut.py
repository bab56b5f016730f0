"""How a model whose layers differ came to be from a dense one, and the files that tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils.hub import cached_file

from hfprune.errors import PlanError
from hfprune.plan import PLAN_FILE, PruningPlan

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""What ``from_pretrained`` takes that says where files are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a model came to be from a dense one.

    Attributes:
        dense: Values that the dense config has for the keys which the plans rewrote.
        count: Number of plans.
        plans: The plans, each made for what the one before left; empty while they have not been read.
    """

    dense: Mapping[str, Any]
    count: int
    plans: tuple[PruningPlan, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cut":
        """Returns itself: nothing in it changes."""
        return self

    def files(self) -> list[str]:
        """Returns the names of the plans' files; ``plan.json`` holds the last."""
        return [f"plan-{number}.json" for number in range(1, self.count)] + [PLAN_FILE]

    def read(self, path: str, **hub: Any) -> "Cut":
        """Returns the cut with the plans of a folder or hub id.

        Args:
            path: The folder or hub id.
            hub: What ``from_pretrained`` takes of the hub: ``revision``, ``token``, ``subfolder`` and others.

        Raises:
            PlanError: A plan is missing or damaged.
        """
        return Cut(dense=self.dense, count=self.count, plans=tuple(_read(path, f, hub) for f in self.files()))


def _read(path: str, file: str, hub: Mapping[str, Any]) -> PruningPlan:
    try:
        found = cached_file(path, file, **hub)
    except OSError as error:
        raise PlanError(
            f"'{path}' has no {file}: its layers differ in width, and only the plan says which units they kept. Copy "
            "the file from where the model was exported."
        ) from error
    return PruningPlan.load(str(found))
