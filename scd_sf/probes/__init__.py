"""Probes of the paper, which measure a model's blocks over steps and frames, and the effect of
leaving blocks out."""
