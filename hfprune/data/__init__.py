"""Calibration, recovery, validation and evaluation text, never overlapping."""

from hfprune.data.sources import InstructionRow, Rows, load_rows
from hfprune.data.text import TextDataModule

__all__ = ["InstructionRow", "Rows", "TextDataModule", "load_rows"]
