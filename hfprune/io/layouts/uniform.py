"""One value per config field: an ordinary Hugging Face folder."""

from typing import Any

from hfprune.io.layouts.apply import not_expressed
from hfprune.io.layouts.base import LAYOUTS, Layout
from hfprune.io.layouts.per_layer import is_per_layer
from hfprune.utils.errors import ConfigError


class Uniform(Layout):
    """Stock config, stock weights; refuses what one value per config field cannot express."""

    name = "uniform"
    stock = True

    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` for a model whose layers differ; the message names the first such parameter."""
        if is_per_layer(model.config):
            raise ConfigError(
                "--layout uniform has one value per config field, which cannot describe what this plan leaves: "
                f"{not_expressed(model)}. Give --layout per_layer (loads with hfprune), --layout padded (loads "
                "anywhere; what is missing is stored as zeros), or keep the same number of units in every layer."
            )

    def written(self, model: Any) -> Any:
        """Returns ``model``."""
        self.check(model)
        return model


LAYOUTS.add(Uniform.name, Uniform())
