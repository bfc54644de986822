"""How SCD is cut from its base model, and how its context meets the noisy chunk.

Presets of ``fusion`` (paper, Table 3 and supplement; docs/adr/0003):
  paper     prefix [adapter(c); x] in front of all decoder blocks (Table 3, "frame concat").
  junction  x alone through the early copies, then prefix [c; x] in front of the late copies,
            which were trained on exactly what c is.
  delta     no prefix: D = c - early(query) once per chunk; per step late(early(x_t) + D).
  channel   Linear([x; c]) per token at the decoder's input (Table 3, "channel concat").
``prefix_rope``: "temporal" gives c the frames before x, "identical" the same frames.
``prefix``: "full" runs c through the blocks with x at every step. "cached" lets c attend only to
itself, so its K/V are computed once per chunk.
``prefix_time``: c's time is that of the encoder's "query", or (as in the released code) that of
the "step" x is at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scd_sf.types import UserError

FUSIONS = ("paper", "junction", "delta", "channel")


@dataclass(frozen=True)
class DecoderConfig:
    """Which layers the decoder copies, and how the context enters."""

    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 25, 26, 27, 28, 29)
    """Layers of the base model that the decoder copies, in order."""
    fusion: str = "delta"
    """How the context enters: paper, junction, delta or channel (docs/adr/0003)."""
    prefix_rope: str = "identical"
    """Positions of a prefix: temporal, the frames before; identical, the same frames."""
    prefix: str = "full"
    """full: the prefix runs through the blocks at every step; cached: once per chunk."""
    split: int | None = None
    """How many of the layers come before the junction; null: those that the encoder also has."""
    prefix_time: str = "query"
    """Time that a prefix is given: query, that of the encoder; step, that of the step (the released
    code's)."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("fusion", self.fusion, FUSIONS),
            ("prefix_rope", self.prefix_rope, ("temporal", "identical")),
            ("prefix", self.prefix, ("full", "cached")),
            ("prefix_time", self.prefix_time, ("query", "step")),
        ):
            if value not in choices:
                raise UserError(f"decoder.{name} is '{value}'; use one of {', '.join(choices)}")
        if self.prefix == "cached" and self.prefix_time == "step":
            raise UserError("decoder.prefix=cached computes c once per chunk: it needs decoder.prefix_time=query")
        if self.split is not None and not 0 <= self.split <= len(self.layers):
            raise UserError(f"decoder.split is {self.split}; it must lie in 0..{len(self.layers)} (number of layers)")

    def unread(self, *defaults: DecoderConfig) -> str:
        """What differs from all ``defaults`` and has no effect, as the message of an error; '' for nothing."""
        for name in ("prefix_rope", "prefix", "prefix_time"):
            value = getattr(self, name)
            if self.fusion in ("delta", "channel") and value not in [getattr(plain, name) for plain in defaults]:
                return f"decoder.{name} is {value}, but fusion {self.fusion} has no prefix: leave it out"
        return ""

    def junction(self, encoder_layers: Sequence[int]) -> int:
        """Number of early blocks, which see the noisy chunk alone ('paper' and 'channel' have none)."""
        if self.fusion in ("paper", "channel"):
            if self.split not in (None, 0):
                raise UserError(
                    f"decoder.split is {self.split}, but fusion '{self.fusion}' has no early blocks: leave it out"
                )
            return 0
        late = (i for i, layer in enumerate(self.layers) if layer not in encoder_layers)
        split = self.split if self.split is not None else next(late, len(self.layers))
        if split == len(self.layers):
            raise UserError(
                f"decoder.layers {list(self.layers)}: no block comes after the junction, so the context would never be "
                "read; end the list with layers that the encoder does not have, or set decoder.split"
            )
        return split


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
        for name, layers in (("encoder_layers", self.encoder_layers), ("decoder.layers", self.decoder.layers)):
            bad = [layer for layer in layers if not 0 <= layer < num_layers]
            if bad or not layers:
                raise UserError(
                    f"model.scd.{name} is {list(layers)}: the base model has layers 0..{num_layers - 1}; "
                    f"{'remove ' + str(bad) if bad else 'name at least one'}"
                )
        self.decoder.junction(self.encoder_layers)
        if self.chunk < 1:
            raise UserError(f"model.scd.chunk is {self.chunk}; it must be at least 1")
