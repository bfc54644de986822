"""The bidirectional Wan 2.1 transformer: teacher, critic, and what stage 1 starts from."""

from __future__ import annotations

from torch import Tensor, nn

from scd_sf.models.trunk import Trunk, WanConfig
from scd_sf.nn.attention import FullSequence
from scd_sf.types import Conditioning


class Wan(nn.Module):
    """Every frame sees every frame. Equal to ``diffusers.WanTransformer3DModel`` (tests/parity)."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.trunk = Trunk(cfg, range(cfg.num_layers))

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t (B, F, C, H, W), t (B,) or (B, F) in [0,1] -> velocity (B, F, C, H, W)."""
        _, frames, _, height, width = x_t.shape
        self.cfg.tokens(height, width)
        rotary = self.trunk.rope(range(frames), height, width, x_t)
        t_BF = t.unsqueeze(1) if t.ndim == 1 else t
        velocity: Tensor = self.trunk(x_t, t_BF, self.trunk.text(cond.text_BLE), rotary, FullSequence())
        return velocity
