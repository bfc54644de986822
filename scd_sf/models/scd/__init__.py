"""Separable Causal Diffusion: the causal encoder, the frame-wise decoder, the transplant from
Wan."""
