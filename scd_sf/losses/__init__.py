"""Losses: pure functions from a model and a batch to (loss, logs)."""
