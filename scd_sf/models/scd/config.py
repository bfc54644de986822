"""Which layers of the base model make SCD's encoder and its decoder, and frames per chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.types import UserError


@dataclass(frozen=True)
class ScdConfig:
    """How SCD is cut out of its base model."""

    encoder_layers: tuple[int, ...] = tuple(range(25))
    """Layers of the base model that make the encoder (from scratch: how many, numbered on)."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder, and how the context enters it."""
    chunk: int = 1
    """Latent frames generated together (paper: 1)."""

    def check(self, num_layers: int) -> None:
        """UserError unless every layer exists in a model of ``num_layers``."""
        for name, layers in (
            ("encoder_layers", self.encoder_layers),
            ("decoder.layers", self.decoder.layers),
        ):
            bad = [layer for layer in layers if not 0 <= layer < num_layers]
            if bad or not layers:
                raise UserError(
                    f"model.scd.{name} is {list(layers)}: the base model has layers 0..{num_layers - 1}; "
                    f"{'remove ' + str(bad) if bad else 'name at least one'}"
                )
        self.decoder.num_early_blocks(self.encoder_layers)
        if self.chunk < 1:
            raise UserError(f"model.scd.chunk is {self.chunk}; it must be at least 1")
