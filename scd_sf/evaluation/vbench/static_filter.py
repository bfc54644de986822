"""VBench's static filter: of the candidates of temporal flickering, the first five whose camera and
scene stand still.

The rule is VBench's ``cli/static_filter.py``: RAFT's flow between neighbouring frames and between
first and last, the mean of its largest 2 %, against thresholds that grow with size and number of
frames. Candidates come in the order of their names as text (0, 1, 10, 11, .., 2, ..), as VBench
takes them, and the search ends at the fifth.
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
from scd_sf.files import Json, new_file, read_json, read_typed, sha256_file, typed, write_json
from scd_sf.types import say

CANDIDATES, STATIC, RECORDS = "flickering", "static", ".static"
WANTED = 5
Flow = Callable[[Tensor, Tensor], Tensor]


def flow_scores(frames_F3HW: Tensor, flow: Flow) -> list[float]:
    """Mean length of the longest 2 % of flow, in pixels: each pair of neighbours, then first-last
    and last-first."""
    count = len(frames_F3HW)
    pairs = [*((i, i + 1) for i in range(count - 1)), (0, count - 1), (count - 1, 0)]
    scores = []
    for one, two in pairs:
        lengths = (
            flow(frames_F3HW[one : one + 1], frames_F3HW[two : two + 1])[0]
            .float()
            .square()
            .sum(0)
            .sqrt()
        )
        longest = int(lengths.numel() * 0.02)
        scores.append(float(lengths.flatten().topk(longest).values.mean()))
    return scores


def is_static(scores: Sequence[float], size: tuple[int, int], frames: int) -> bool:
    """VBench's rule. ``size``: height and width of the frames; ``frames``: how many; ``scores``:
    one more than that."""
    threshold, allowed = 3.0 * (min(size) / 256.0), round(2 * (frames / 16.0))
    if sum(score > threshold for score in scores[:-2]) > allowed:
        return False
    return all(score <= threshold * allowed * 2 for score in scores[-2:])


@dataclass
class StaticFilter:
    """RAFT of ``weights`` on ``device``. Built before anything else is done, so that missing
    weights are said first."""

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

    def choose(self, out: Path, prompt: str, count: int) -> None:
        """Judge a prompt's candidates, put the chosen ones into ``static/`` as 0..4, and record it.

        What an earlier run recorded of the same files and weights is not judged again.
        """
        folder = out / CANDIDATES
        names = sorted(video_name(prompt, number) for number in range(count))
        hashes = {name: sha256_file(folder / name) for name in names}
        inputs: Json = {"prompt": prompt, "raft_sha256": self.sha256, "candidates": hashes}
        record = _record(out, prompt)
        earlier = (
            read_json(record, "delete it to filter the prompt again") if record.is_file() else {}
        )
        judged: dict[str, bool] = {}
        if {name: earlier.get(name) for name in inputs} == inputs:
            judged = typed(
                earlier.get("judged"),
                dict[str, bool],
                record,
                "delete it to filter the prompt again",
            )
        else:
            record.unlink(missing_ok=True)
            for name in names:
                judged[name] = self.judge(folder / name)
                if sum(judged.values()) == WANTED:
                    break
        chosen = [name for name in names if judged.get(name)][:WANTED]
        for number in range(WANTED):
            target = out / STATIC / video_name(prompt, number)
            if number < len(chosen):
                _place(folder / chosen[number], target)
            else:
                target.unlink(missing_ok=True)
        write_json(record, {**inputs, "judged": judged, "chosen": chosen})


def _record(out: Path, prompt: str) -> Path:
    return out / RECORDS / f"{video_name(prompt, 0)}.json"


def _place(source: Path, target: Path) -> None:
    """``target`` becomes ``source``: a hard link where the disk has them, else a copy; whole or not
    there."""
    with new_file(target) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)


def run_static_filter(
    out: Path, prompts: Sequence[str], count: int, static: StaticFilter, ranks: Ranks
) -> None:
    """Filter every prompt's candidates, shared among the ranks. Prompts with fewer than five are
    named at the end."""
    for folder in (STATIC, RECORDS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    todo = list(prompts)[ranks.rank :: ranks.world]
    for number, prompt in enumerate(todo, 1):
        static.choose(out, prompt, count)
        if ranks.is_main:
            say(f"static filter: {number}/{len(todo)} prompts")
    ranks.barrier()
    short = [
        f"'{prompt}' ({found})"
        for prompt in prompts
        if (found := len(chosen_of(out, prompt))) < WANTED
    ]
    if ranks.is_main and short:
        say(
            f"static filter: fewer than {WANTED} static videos of {len(short)} prompts: {', '.join(short[:5])}"
        )


def chosen_of(out: Path, prompt: str) -> list[str]:
    """The candidates that the filter chose. UserError if it has not run."""
    remedy = "run the static filter: vbench_eval/sample.py with raft="
    return read_typed(_record(out, prompt), _Record, remedy).chosen


@dataclass(frozen=True)
class _Record:
    """What is read of a prompt's record."""

    chosen: list[str]
