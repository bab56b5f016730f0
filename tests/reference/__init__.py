"""Slow oracles, written from the papers' formulas by another route than the product; they import nothing from it."""
