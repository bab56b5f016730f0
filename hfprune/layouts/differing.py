"""Per-layer values in the config, and the plan: what only hfprune loads."""

from typing import Any

from hfprune.layouts.base import LAYOUTS, Layout


class PerLayer(Layout):
    """``per_layer_config`` in config.json and the plans beside it; an ordinary folder where no layer differs."""

    name = "per_layer"

    def check(self, model: Any) -> None:
        """Accepts every model."""

    def written(self, model: Any) -> Any:
        """Returns ``model``: its config writes what differs."""
        return model


LAYOUTS.add(PerLayer.name, PerLayer())
