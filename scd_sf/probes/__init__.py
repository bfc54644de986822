"""Probes of the paper: what a model's blocks do over steps and frames, and which of them could be
left out."""
