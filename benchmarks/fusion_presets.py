"""Which fusion of the context into the decoder is best? Flow loss zero-shot, and after a short
budget, same seeds.

    python benchmarks/fusion_presets.py --base assets/wan_doom --data runs/demo/latents \\
        --out runs/fusion.json

Every variant starts from the same teacher, sees the same batches, times and noise, and is validated
at the same fixed noise (docs/adr/0003-fusion-delta.md). Resumes: finished variants in the output
file are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from scd_sf.config import HelpFormatter
from scd_sf.data.latents import LatentClips, epoch_order
from scd_sf.diffusion.noise import generator
from scd_sf.distributed import keep_freed_memory
from scd_sf.files import write_json
from scd_sf.losses.flow_matching import FlowMatchingConfig, flow_matching_loss
from scd_sf.models.build import Scd
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.transplant import transplant_scd
from scd_sf.models.wan.weights import load_wan
from scd_sf.types import exit_on_user_error

ENCODER, DECODER = tuple(range(10)), (0, 1, 10, 11)
VARIANTS = [  # fusion, prefix RoPE, prefix
    *(
        (fusion, rope, prefix)
        for fusion in ("junction", "paper")
        for rope in ("identical", "temporal")
        for prefix in ("full", "cached")
    ),
    ("delta", "identical", "full"),
    ("channel", "identical", "full"),
]


@torch.no_grad()
def validation_loss(model: Scd, clips: LatentClips) -> float:
    """Mean flow loss of at most 32 clips with their text and a pure-noise query, without dropout and
    corruption."""
    cfg = FlowMatchingConfig(noise_samples=4, context_noise=0.0, text_dropout=0.0, query_pure=1.0)
    batch = clips.batch(list(range(0, len(clips), max(1, len(clips) // 32)))[:32])
    loss, _ = flow_matching_loss(
        model, batch.latents_BFCHW, batch.text, clips.null, cfg, generator(0, "fusion")
    )
    return float(loss)


def run(variant: tuple[str, str, str], args: argparse.Namespace) -> dict[str, object]:
    """Train one variant; returns its entry of the output file."""
    fusion, rope, prefix = variant
    train, val = LatentClips(args.data / "train"), LatentClips(args.data / "val")
    lr, steps = args.lr, args.steps
    model, _ = transplant_scd(
        load_wan(args.base), ScdConfig(ENCODER, DecoderConfig(DECODER, fusion, rope, prefix))
    )
    zero_shot = validation_loss(model, val)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
    cfg = FlowMatchingConfig()
    started = time.process_time()
    for step in range(steps):
        batch = train.batch(epoch_order(args.seed, step, args.batch, len(train)))
        rng = generator(args.seed, "train", step)
        loss, _ = flow_matching_loss(model, batch.latents_BFCHW, batch.text, train.null, cfg, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
    seconds = time.process_time() - started
    return {
        "fusion": fusion,
        "prefix_rope": rope,
        "prefix": prefix,
        "zero_shot": zero_shot,
        "after": validation_loss(model, val),
        "steps": steps,
        "batch": args.batch,
        "seed": args.seed,
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Wan in diffusers layout")
    parser.add_argument(
        "--data", type=Path, required=True, help="encoded clips with train/ and val/"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON with one entry per variant")
    parser.add_argument("--steps", type=int, default=150, help="updates of every variant")
    parser.add_argument("--batch", type=int, default=4, help="clips per update")
    parser.add_argument("--lr", type=float, default=8e-4, help="learning rate")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order of clips, the noise and the times"
    )
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["variants"] if args.out.is_file() else []
    torch.set_num_threads(1)
    keep_freed_memory()
    for variant in VARIANTS:
        keys = {(row["fusion"], row["prefix_rope"], row["prefix"], row["seed"]) for row in rows}
        if (*variant, args.seed) in keys:
            continue
        rows.append(run(variant, args))
        write_json(args.out, {"variants": rows})
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
