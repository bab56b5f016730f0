"""Structured pruning: computes a pruning plan from a model, calibration batches and a budget."""
