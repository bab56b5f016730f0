"""Structured pruning: a model, batches and a budget become a pruning plan."""
