"""Groups of options: single keywords, signatures, and what is refused."""

import inspect
from dataclasses import dataclass, field

import pytest

from hfprune.utils.errors import ConfigError
from hfprune.utils.flat_options import flat_options


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of something.

    Attributes:
        width: The width.
        names: The names.
            On two lines.

    Raises:
        ConfigError: Never.
    """

    width: int = 1
    names: list[str] = field(default_factory=list)


class Box:
    @flat_options(size=Size)
    def __init__(self, path: str, *, colour: str = "red", size: Size | None = None) -> None:
        self.path, self.colour, self.size = path, colour, size or Size()


class Chest(Box):
    def __init__(self, path: str, lid: bool = True, **kwargs: object) -> None:
        super().__init__(path, **kwargs)
        self.lid = lid


def test_groups_and_single_keywords():
    assert Box("p", size=Size(width=3)).size == Box("p", width=3).size == Chest("p", width=3).size == Size(width=3)
    assert Box("p").size == Size()
    assert Chest("p", lid=False, colour="blue", width=2).colour == "blue"


def test_the_signature_is_flat_and_documented():
    parameters = inspect.signature(Box).parameters
    assert list(parameters) == ["path", "colour", "width", "names"]
    assert (parameters["width"].default, parameters["width"].annotation, parameters["names"].default) == (1, int, [])
    assert "    width: The width.\n    names: The names.\n        On two lines." in Box.__init__.__doc__


def test_what_is_refused():
    with pytest.raises(ConfigError, match="`width` is an option of `size`: give it there only"):
        Box("p", width=2, size=Size())
    with pytest.raises(TypeError, match="height"):
        Box("p", height=2)
