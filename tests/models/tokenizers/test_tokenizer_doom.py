"""The tokenizer that is shipped: whole, small, and what its own record says."""

from __future__ import annotations

import json

import recipe_runner
import torch

from scd_sf.evaluation.frames import reconstruction_figures
from scd_sf.models.tokenizers.tokenizer import load_tokenizer

FOLDER = recipe_runner.ROOT / "assets" / "tokenizer_doom"


def test_shipped_tokenizer() -> None:
    """It reads, fits its record, and draws a wall with a lit door in a dark floor's room better
    than a blur would."""
    tokenizer = load_tokenizer(FOLDER)
    report, origin = (
        json.loads((FOLDER / name).read_text()) for name in ("evaluation.json", "provenance.json")
    )
    assert (tokenizer.channels, tokenizer.spatial) == (12, 16)
    assert (
        tokenizer.sha256 == report["sha256"]
        and report["psnr"] >= 27
        and abs(report["latent_std"] - 1) < 0.1
    )
    assert origin["licence"] == "Apache-2.0" and len(origin["data_hash"]) == 64
    assert (FOLDER / "diffusion_pytorch_model.safetensors").stat().st_size <= 4_000_000
    picture = torch.full((3, 128, 128), -0.7)
    picture[0] += 0.15
    picture[:, 64:] = torch.tensor([-0.75, -0.8, -0.9]).view(3, 1, 1)
    picture[:, 40:80, 50:70] = torch.tensor([0.4, -0.9, -0.9]).view(3, 1, 1)
    latents = tokenizer.encode(picture[None, None])
    made = tokenizer.decode(latents)[0].clamp(-1, 1)
    assert latents.shape == (1, 1, 12, 8, 8) and float(latents.abs().max()) < 30
    assert (
        reconstruction_figures((made / 2 + 0.5).clamp(0, 1), picture[None] / 2 + 0.5)["psnr"] > 24
    )
