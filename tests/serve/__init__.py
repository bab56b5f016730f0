"""Exported folders in the software that serves them."""
