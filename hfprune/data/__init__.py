"""Disjoint calibration, recovery, validation and evaluation data."""

from hfprune.data.formats import ChatRow, InstructionRow, Rows, Turn
from hfprune.data.sources import load_rows
from hfprune.data.text import TextDataModule

__all__ = ["ChatRow", "InstructionRow", "Rows", "TextDataModule", "Turn", "load_rows"]
