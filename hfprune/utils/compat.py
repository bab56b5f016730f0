"""Compatibility: names of other libraries that are private or differ between their versions, one function each."""

from typing import Any


def parser_actions(parser: Any) -> list[Any]:
    """Returns the actions (options) of an ``argparse`` parser.

    ``argparse`` lists them in the private ``ArgumentParser._actions`` only (Python 3.11 to 3.14; jsonargparse 4.40 to
    4.53 adds its own there). Without it, misspelled flags would get no suggestion and messages no flag.

    Args:
        parser: An ``argparse.ArgumentParser``, or a subclass such as jsonargparse's or Lightning's.
    """
    return list(parser._actions)


def instantiate(parser: Any, config: Any) -> Any:
    """Returns a configuration with the classes that it names instantiated.

    jsonargparse 4.49 renamed ``instantiate_classes`` to ``instantiate``, and 5.0 removes the old name.

    Args:
        parser: A jsonargparse parser.
        config: The namespace that the parser returned.
    """
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)
