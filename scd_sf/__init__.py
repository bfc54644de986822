"""scd_sf: Separable Causal Diffusion on Wan 2.1 and its distillation by Self-Forcing."""

__version__ = "0.1.0"
