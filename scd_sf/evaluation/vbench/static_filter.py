"""VBench's static filter: of the candidates of temporal flickering, the first five whose camera and scene stand still.

The rule is VBench's ``cli/static_filter.py``: RAFT's flow between neighbouring frames and between first and last, the
mean of its largest 2 %, against thresholds that grow with size and number of frames. Candidates come in the order of
their names as text (0, 1, 10, 11, .., 2, ..), as VBench takes them, and the search ends at the fifth.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.data.clips import read_video
from scd_sf.distributed import Ranks
from scd_sf.evaluation.raft import load_raft, optical_flow
from scd_sf.evaluation.vbench.prompts import video_name
from scd_sf.files import new_file, read_json, sha256_file, write_json
from scd_sf.types import UserError, say

CANDIDATES, STATIC, RECORDS = "flickering", "static", ".static"
WANTED = 5
Flow = Callable[[Tensor, Tensor], Tensor]


def flow_scores(frames_F3HW: Tensor, flow: Flow) -> list[float]:
    """Mean length of the longest 2 % of flow, in pixels: each pair of neighbours, then first-last and last-first."""
    count = len(frames_F3HW)
    pairs = [*((i, i + 1) for i in range(count - 1)), (0, count - 1), (count - 1, 0)]
    scores = []
    for one, two in pairs:
        lengths = flow(frames_F3HW[one : one + 1], frames_F3HW[two : two + 1])[0].float().square().sum(0).sqrt()
        longest = int(lengths.numel() * 0.02)
        scores.append(float(lengths.flatten().topk(longest).values.mean()))
    return scores


def is_static(scores: Sequence[float], size: tuple[int, int], frames: int) -> bool:
    """VBench's rule. ``size``: height and width of the frames; ``frames``: how many; ``scores``: one more than that."""
    threshold, allowed = 3.0 * (min(size) / 256.0), round(2 * (frames / 16.0))
    if sum(score > threshold for score in scores[:-2]) > allowed:
        return False
    return all(score <= threshold * allowed * 2 for score in scores[-2:])


@dataclass
class StaticFilter:
    """RAFT of ``weights`` on ``device``. Built before anything else is done, so that missing weights are said first."""

    weights: Path
    device: torch.device

    def __post_init__(self) -> None:
        self.sha256 = sha256_file(self.weights)
        self.model = load_raft(self.weights).to(self.device)

    def judge(self, path: Path) -> bool:
        """Whether a video stands still."""
        frames = read_video(path).to(self.device)

        def flow(one: Tensor, two: Tensor) -> Tensor:
            return optical_flow(self.model, one, two)

        height, width = frames.shape[-2:]
        return is_static(flow_scores(frames, flow), (height, width), len(frames))

    def choose(self, out: Path, prompt: str, count: int) -> dict[str, object]:
        """Judge a prompt's candidates, put the chosen ones into ``static/`` as 0..4, and record it. What an earlier
        run recorded of the same files and weights is kept."""
        names = sorted(video_name(prompt, number) for number in range(count))
        files = [out / CANDIDATES / name for name in names]
        record = out / RECORDS / f"{video_name(prompt, 0)}.json"
        told: dict[str, object] = {
            "prompt": prompt,
            "raft_sha256": self.sha256,
            "candidates": {f.name: sha256_file(f) for f in files},
        }
        if record.is_file():
            entry = read_json(record, "delete it to filter the prompt again")
            if {name: entry.get(name) for name in told} == told and _placed(out, prompt, entry):
                return entry
            record.unlink()
        judged: dict[str, bool] = {}
        for file in files:
            judged[file.name] = self.judge(file)
            if sum(judged.values()) == WANTED:
                break
        chosen = [name for name, still in judged.items() if still]
        for number in range(WANTED):
            target = out / STATIC / video_name(prompt, number)
            if number < len(chosen):
                _place(out / CANDIDATES / chosen[number], target)
            else:
                target.unlink(missing_ok=True)
        entry = told | {"judged": judged, "chosen": chosen}
        write_json(record, entry)
        return entry


def _placed(out: Path, prompt: str, entry: dict[str, object]) -> bool:
    """Whether every chosen video lies in ``static/`` as recorded."""
    chosen, hashes = entry.get("chosen"), entry["candidates"]
    assert isinstance(hashes, dict)
    if not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen) or len(chosen) > WANTED:
        return False
    targets = [out / STATIC / video_name(prompt, number) for number in range(len(chosen))]
    return all(t.is_file() and sha256_file(t) == hashes.get(name) for t, name in zip(targets, chosen, strict=True))


def _place(source: Path, target: Path) -> None:
    """``target`` becomes ``source``: a hard link where the disk has them, else a copy; whole or not there."""
    with new_file(target) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)


def run_filter(out: Path, prompts: Sequence[str], count: int, static: StaticFilter, ranks: Ranks) -> None:
    """Filter every prompt's candidates, shared among the ranks. Prompts with fewer than five are named at the end."""
    for folder in (STATIC, RECORDS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    todo = list(prompts)[ranks.rank :: ranks.world]
    for number, prompt in enumerate(todo, 1):
        static.choose(out, prompt, count)
        if ranks.is_main:
            say(f"static filter: {number}/{len(todo)} prompts")
    ranks.barrier()
    short = [f"'{prompt}' ({found})" for prompt in prompts if (found := len(chosen_of(out, prompt))) < WANTED]
    if ranks.is_main and short:
        say(f"static filter: fewer than {WANTED} static videos of {len(short)} prompts: {', '.join(short[:5])}")


def chosen_of(out: Path, prompt: str) -> list[str]:
    """The candidates that the filter chose. UserError if it has not run."""
    record = out / RECORDS / f"{video_name(prompt, 0)}.json"
    chosen = read_json(record, "run the static filter: vbench_eval/sample.py with raft=").get("chosen")
    if not isinstance(chosen, list):
        raise UserError(f"{record}: no list 'chosen'; delete it and run the filter again")
    return [str(name) for name in chosen]
