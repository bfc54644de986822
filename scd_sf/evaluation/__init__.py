"""Figures on finished videos: pure functions on tensors in memory. Nothing here trains, samples or reads a dataset."""
