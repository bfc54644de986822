"""The teacher in assets/wan_doom: small, in Wan 2.1's own layout, and read alike by diffusers and
by us."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from scd_sf.data.clips import read_video
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.preview import Preview
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.transplant import transplant_scd
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.vae import load_vae
from scd_sf.models.wan.weights import load_wan
from scd_sf.types import Conditioning, VideoShape

TEACHER = Path(__file__).parents[2] / "assets" / "wan_doom"


def test_small_enough_and_only_safetensors_and_words() -> None:
    files = [file for file in TEACHER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}


def test_transformer_equals_diffusers() -> None:
    ours = load_wan(TEACHER)
    theirs = WanTransformer3DModel.from_pretrained(TEACHER, subfolder="transformer")
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 9, 16, 8, 8, generator=rng), torch.tensor([0.3, 0.9])
    text = torch.randn(2, 24, 384, generator=rng)
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)
        difference = (ours(x, t, Conditioning(text)) - expected).abs().max()
    assert difference < 2e-5


def test_stock_pipeline_runs() -> None:
    pipeline = WanPipeline.from_pretrained(TEACHER, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    encoder = load_text_encoder(TEACHER)
    prompt = encoder.encode(
        ["left turn: the camera turns left in a round arena with tan walls"]
    ).text_BLE
    null = encoder.encode([""]).text_BLE
    frames = pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=null,
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
    ).frames
    assert tuple(frames.shape) == (1, 9, 3, 64, 64)
    assert frames.isfinite().all()


def test_vae_round_trip_and_validation_video(tmp_path: Path) -> None:
    vae = load_vae(TEACHER)
    # the mean clip: flat tests are not its world
    scene = vae.decode(torch.zeros(1, 3, 16, 8, 8)).clamp(-1, 1)
    assert (vae.decode(vae.encode(scene)) - scene).abs().mean() < 0.05
    scd, _ = transplant_scd(
        load_wan(TEACHER), ScdConfig(tuple(range(10)), DecoderConfig((0, 1, 10, 11)))
    )
    cond = load_text_encoder(TEACHER).encode(["still picture", "forward walk"])
    preview = Preview(
        str(TEACHER), cond, VideoShape(3, 16, 8, 8), FewStepSampler((1.0, 0.8)), tmp_path
    )
    videos, _ = preview.sample(scd, [0, 1])
    frames, _ = preview.write(videos, 7)
    assert tuple(frames.shape) == (9, 64, 128, 3)
    assert tuple(read_video(tmp_path / "00000007.mp4").shape) == (9, 3, 64, 128)
    assert torch.equal(videos, preview.sample(scd, [0, 1])[0])
    # as by two ranks
    shared = preview.sample(scd, [0])[0].int() + preview.sample(scd, [1])[0].int()
    assert (shared - videos.int()).abs().max() <= 1 and not preview.sample(scd, [])[0].any()


def test_without_a_vae_there_are_no_videos(tmp_path: Path) -> None:
    cond = Conditioning(torch.zeros(1, 2, 384))
    preview = Preview(
        str(tmp_path / "nowhere"), cond, VideoShape(3, 16, 8, 8), FewStepSampler(), tmp_path
    )
    assert preview.vae is None
