"""Griffe extension of the documentation site: the project's docstrings as mkdocstrings reads them."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Reads a section ``Example:`` as ``Examples:``, and Sphinx roles (``:func:`name```) as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:\s*$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r":(?:class|func|meth|attr|mod|data):`~?([^`]+)`", r"`\1`", text)
