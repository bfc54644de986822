"""Videos from a student checkpoint and text prompts: mp4 files and a manifest. The same as ``scd
sample``.

    python recipes/sample.py checkpoint=runs/demo/stage3-scd base=assets/wan_doom \\
        prompts='["the camera turns left in a green hall"]' out=runs/samples
    torchrun --nproc_per_node 8 recipes/sample.py checkpoint=student.safetensors prompt_file=prompts.jsonl \\
        base=/models/Wan2.1-T2V-1.3B-Diffusers out=runs/samples

The sampler and the size come from the checkpoint. A prompt's n-th video has the seed ``seed`` + n,
or its row's own ``seed`` + n, so it does not depend on the batch, the ranks or what else is made. A
row of a jsonl file: ``{"prompt": "a car", "seed": 7, "start": "image.png", "then": [[41, "it
rains"]]}``. The same command skips what is there. ``start=image.png`` continues an image or a
video; ``video=clip.mp4 strength=0.8`` makes a video anew, for which no student is trained;
``window=18 sink=3`` makes videos longer than training.
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.distributed import init_distributed
from scd_sf.generation.folder import run_samples
from scd_sf.generation.sampling import SampleConfig
from scd_sf.types import exit_on_user_error


def main() -> None:
    cfg = from_command_line(SampleConfig, __doc__ or "")
    run_samples(cfg, init_distributed())


if __name__ == "__main__":
    exit_on_user_error(main)
