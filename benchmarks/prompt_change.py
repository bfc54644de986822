"""How well does a video follow a prompt that changes while it runs, by what becomes of the past?

    python benchmarks/prompt_change.py --checkpoint runs/demo/stage3-scd \\
        --data runs/demo/latents/val --judges runs/demo/results/judges.safetensors \\
        --out docs/results/prompt_change.json

For each held-out clip of the demo's world: one length of training under its prompt, then two more
under one of another place and another motion. The demo's judges say for each of the two whether it
shows the new place and the new motion. Window and sink as ``scd serve`` has them. Controls: the
prompt never changes (floor), and the new one from the beginning (ceiling). Prints a table.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import find
from scd_sf.config import HelpFormatter
from scd_sf.data.latents import LatentClips
from scd_sf.evaluation.judges import Judges, adherence, load_judges
from scd_sf.files import write_json
from scd_sf.generation.generate import clips_of, generate_latents
from scd_sf.generation.prompt_change import HISTORIES, PromptChange
from scd_sf.models.build import describe_checkpoint, load_student
from scd_sf.types import Conditioning, exit_on_user_error


def other_rows(tags: list[tuple[str, str]]) -> list[int]:
    """For each clip the next one of another place and another motion."""
    count = len(tags)
    return [
        next(
            other % count
            for other in range(row + 1, row + count)
            if all(a != b for a, b in zip(tags[row], tags[other % count], strict=True))
        )
        for row in range(count)
    ]


def jump(latents: Tensor, frame: int) -> float:
    """Root mean square change into ``frame``, relative to the median one of the frames before."""
    change = (latents[:, 1:] - latents[:, :-1]).square().mean((2, 3, 4)).sqrt()
    return float((change[:, frame - 1] / change[:, : frame - 1].median(1).values).mean())


def row_of(judges: Judges, latents: Tensor, tags: list[tuple[str, str]]) -> list[dict[str, object]]:
    """Adherence to ``tags`` of each length of training after the first."""
    places, motions = ([tag[part] for tag in tags] for part in (0, 1))
    return [
        asdict(adherence(judges, part, places, motions)) for part in latents.chunk(3, dim=1)[1:]
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory of a student")
    parser.add_argument("--data", type=Path, required=True, help="encoded clips with tags")
    parser.add_argument("--judges", type=Path, required=True, help="judges.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; each adds one")
    args = parser.parse_args()
    checkpoint = find(args.checkpoint, "ema")
    student, _ = load_student(checkpoint, "ema", None)
    sampler = describe_checkpoint(checkpoint, "ema")[0].sampler.build()
    clips, judges = LatentClips(args.data), load_judges(args.judges)
    text = clips.batch(list(range(len(clips)))).text
    tags = [(row.tags["place"], row.tags["motion"]) for row in clips.rows]
    others = other_rows(tags)
    new_tags, new_text = [tags[row] for row in others], Conditioning(text.text_BLE[others])
    length, chunk = clips.shape.frames, student.chunk
    size = (3 * length, clips.shape.channels, clips.shape.height, clips.shape.width)
    rows: dict[str, object] = {}
    changes: dict[str, dict[int, PromptChange]] = {
        history: {length // chunk: PromptChange(new_text, history)} for history in HISTORIES
    }
    for name, change in [*changes.items(), ("no change (floor)", {}), ("new from the start", {})]:
        start = new_text if name == "new from the start" else text
        latents = clips_of(
            generate_latents(
                student,
                start,
                [args.seed + row for row in range(len(clips))],
                size,
                sampler,
                window=length - chunk,
                sink=chunk,
                changes=change,
            )
        )
        parts = row_of(judges, latents, new_tags)
        rows[name] = {"after": parts, "jump": jump(latents, length)}
        numbers = [
            "-" if part[key] is None else f"{100 * float(str(part[key])):.0f}"
            for part in parts
            for key in ("place", "motion", "left_right")
        ]
        print(f"| {name} | {' | '.join(numbers)} | {jump(latents, length):.2f} |", flush=True)
    write_json(
        args.out,
        {"clips": len(clips), "seed": args.seed, "latent_frames": length, "histories": rows},
    )


if __name__ == "__main__":
    exit_on_user_error(main)
