"""How near a video that is made anew is to the one it is made from, by strength: mean PSNR in dB over
the frames of validation clips, to the clip and to what the VAE gives back of it. Toy sizes, and a
student that was not trained for it.

    python benchmarks/video_to_video.py --checkpoint runs/demo/stage3-scd --clips runs/demo/clips

``own``: under the clip's caption; ``other``: under that of another clip, half the set away.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.config import HelpFormatter
from scd_sf.data.clips import ClipSet
from scd_sf.diffusion.samplers import first_step
from scd_sf.evaluation.frames import psnr_frames
from scd_sf.generation.generate import as_uint8, clips_of, decode, generate
from scd_sf.generation.inputs import chunk_inputs
from scd_sf.generation.sampling import SampleConfig, open_generator
from scd_sf.types import exit_on_user_error


def psnr(videos: Tensor, reference: Tensor) -> float:
    """Mean over all frames of uint8 videos (B, F, 3, H, W)."""
    return round(float(psnr_frames(videos / 255, reference / 255).mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a distilled student's run")
    parser.add_argument("--clips", type=Path, required=True, help="a folder of clips")
    parser.add_argument("--base", default="", help="the Wan directory; empty: the checkpoint's")
    parser.add_argument("--count", type=int, default=16, help="clips, spread over those of val")
    args = parser.parse_args()
    clips = ClipSet(args.clips, "val")
    cfg = SampleConfig(
        args.checkpoint,
        "",
        base=args.base,
        frames=clips.frames,
        height=clips.height,
        width=clips.width,
        text_cache="off",
    )
    parts, _ = open_generator(cfg, torch.device("cpu"))
    indices = range(0, len(clips), max(1, len(clips) // args.count))[: args.count]
    videos, captions = clips.videos(indices), [clips[index].caption for index in indices]
    pixels, half = videos / 255, len(captions) // 2
    back = as_uint8(decode(parts.vae, parts.vae.encode(pixels * 2 - 1)))
    print(json.dumps({"clips": len(videos), "vae": psnr(back, videos)}))
    prompts = {"own": captions, "other": captions[half:] + captions[:half]}
    for strength in reversed(parts.sampler.times):
        row: dict[str, float] = {"strength": round(strength, 4)}
        row["steps"] = parts.sampler.steps - first_step(parts.sampler, strength)
        for name, texts in prompts.items():
            inputs = chunk_inputs(parts.vae, [pixels], parts.student.chunk, strength)
            made = generate(
                parts.student,
                parts.vae,
                parts.text.encode(texts),
                range(len(texts)),
                parts.shape,
                parts.sampler,
                inputs=inputs,
            )
            frames = as_uint8(clips_of(made))
            row |= {f"{name}, clip": psnr(frames, videos), f"{name}, vae": psnr(frames, back)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
