"""Disjoint calibration, recovery, validation and evaluation data."""

from hfprune.data.formats import ChatRow, InstructionRow, Rows, Turn
from hfprune.data.options import BatchOptions, ReadingOptions, SampleOptions, TokenOptions, WindowOptions
from hfprune.data.sources import load_rows
from hfprune.data.text import TextDataModule

__all__ = [
    "BatchOptions",
    "ChatRow",
    "InstructionRow",
    "ReadingOptions",
    "Rows",
    "SampleOptions",
    "TextDataModule",
    "TokenOptions",
    "Turn",
    "WindowOptions",
    "load_rows",
]
