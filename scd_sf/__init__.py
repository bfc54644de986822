"""scd_sf: Separable Causal Diffusion on Wan 2.1 and its distillation by Self-Forcing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scd_sf.generation.pipeline import SCDWanPipeline

__version__ = "0.1.0"
__all__ = ["SCDWanPipeline", "__version__"]


def __getattr__(name: str) -> object:
    """The pipeline is imported where it is asked for: that takes seconds."""
    if name == "SCDWanPipeline":
        from scd_sf.generation.pipeline import SCDWanPipeline

        return SCDWanPipeline
    raise AttributeError(f"module 'scd_sf' has no attribute '{name}'")
