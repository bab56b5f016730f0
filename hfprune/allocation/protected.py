"""Protected layers: the first and last layers keep all units, and another allocation spends the budget."""

from dataclasses import replace

from hfprune.allocation.base import Allocation, Allotment, Inventory, Scores
from hfprune.allocation.uniform import Uniform
from hfprune.utils.errors import ConfigError


class Protected(Allocation):
    """Keeps the first and last layers dense and spends the whole budget on the layers between.

    LLM-Pruner's scripts keep the first 4 and the last 2 of 32 layers: ``Protected(first=4, last=2,
    allocation=Uniform(share=0.25, compat="llm_pruner"))``.

    Args:
        first: Number of first layers to protect.
        last: Number of last layers to protect.
        allocation: How the budget is spent on the other layers; ``Uniform()`` if not given.

    Raises:
        ConfigError: A number is negative.

    Source: LLM-Pruner (Ma et al., 2023, arXiv:2305.11627).

    Example:
        >>> from hfprune.plan import Group
        >>> groups = tuple(Group(name=f"{i}.mlp", kind="mlp", num_units=8, slices=(), layer=i) for i in range(2))
        >>> inventory = Inventory(groups=groups, costs=(10, 10), dense_params=200, hidden_size=4, layer_params=(80, 80))
        >>> Protected(first=1, last=0).allot(inventory, 160, round_to=1, scores=None).widths
        (8, 4)
    """

    takes_layers = True

    def __init__(self, *, first: int = 4, last: int = 2, allocation: Allocation | None = None) -> None:
        if first < 0 or last < 0:
            raise ConfigError(f"Protected: first={first} and last={last} must not be negative.")
        if allocation is not None and allocation.measures:
            raise ConfigError(
                f"Protected: {type(allocation).__name__} cannot measure within Protected. Give it its "
                f"{allocation.measures}."
            )
        self.first, self.last, self.allocation = first, last, allocation or Uniform()

    @property
    def own_budget(self) -> bool:
        """As the inner allocation."""
        return self.allocation.own_budget

    def needs_scores(self, inventory: Inventory) -> bool:
        """As the inner allocation."""
        return self.allocation.needs_scores(inventory)

    def check(self, inventory: Inventory) -> None:
        """Raises ``ConfigError`` if no layer is left to prune or the inner allocation does not support the units."""
        self.check_channels(inventory)
        layers = len(inventory.layer_params)
        if self.first + self.last >= layers:
            raise ConfigError(f"{self} protects all of the model's {layers} layers.")
        between, open_to = self._open(inventory)
        if not open_to or inventory.fixed_layers >= set(between):
            raise ConfigError(f"{self} and {inventory.skip or 'the settings'} leave nothing to prune.")
        self.allocation.check(inventory)

    def allot(self, inventory: Inventory, target: int, *, round_to: int, scores: Scores | None) -> Allotment:
        """Returns the inner allotment for the other layers."""
        between, open_to = self._open(inventory)
        fixed = inventory.fixed_layers | (set(range(len(inventory.layer_params))) - set(between))
        inner = replace(inventory.select(open_to), fixed_layers=frozenset(fixed))
        found = self.allocation.allot(inner, target, round_to=round_to, scores=scores)
        return replace(found.within(inventory, open_to), exact_width=found.exact_width)

    def _open(self, inventory: Inventory) -> tuple[range, list[int]]:
        """Returns the layers that are not protected, and the positions of their groups and of those of no layer."""
        between = range(self.first, len(inventory.layer_params) - self.last)
        return between, [i for i, g in enumerate(inventory.groups) if g.layer is None or g.layer in between]
