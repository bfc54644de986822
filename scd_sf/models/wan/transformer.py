"""The bidirectional Wan 2.1 transformer: teacher, critic, and what stage 1 starts from."""

from __future__ import annotations

from torch import Tensor, nn

from scd_sf.models.trunk import RunBlocks, Trunk, WanConfig, run_all
from scd_sf.nn.attention import FullSequence
from scd_sf.types import Conditioning


class Wan(nn.Module):
    """Every frame sees every frame. Equal to ``diffusers.WanTransformer3DModel`` (tests/parity)."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.trunk = Trunk(cfg, range(cfg.num_layers))
        self.run_blocks: RunBlocks = run_all

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t (B, F, C, H, W), t (B,) or (B, F) in [0,1] -> velocity (B, F, C, H, W)."""
        trunk, (frames, _, height, width) = self.trunk, x_t.shape[1:]
        self.cfg.tokens(height, width)  # UserError unless patches divide the frame
        rotary = trunk.rope(range(frames), height, width, x_t)
        times, text = trunk.times(t.unsqueeze(1) if t.ndim == 1 else t), trunk.text(cond.text_BLE)
        tokens = trunk.embed(x_t)
        tokens = self.run_blocks(trunk, tokens, times, text, rotary, FullSequence(), slice(None))
        return trunk.velocity(tokens, times.temb, height, width)
