"""VBench's static filter, which chooses the first five candidates of temporal flickering whose
camera and scene stand still.

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
VIDEOS_PER_PROMPT = 5
Flow = Callable[[Tensor, Tensor], Tensor]


def flow_scores(frames_F3HW: Tensor, flow: Flow) -> list[float]:
    """Mean length of the longest 2 % of flow, in pixels: each pair of neighbours, then first-last
    and last-first."""
    count = len(frames_F3HW)
    pairs = [*((i, i + 1) for i in range(count - 1)), (0, count - 1), (count - 1, 0)]
    scores = []
    for first, second in pairs:
        lengths = (
            flow(frames_F3HW[first : first + 1], frames_F3HW[second : second + 1])[0]
            .float()
            .square()
            .sum(0)
            .sqrt()
        )
        count_of_longest = int(lengths.numel() * 0.02)
        scores.append(float(lengths.flatten().topk(count_of_longest).values.mean()))
    return scores


def is_static(scores: Sequence[float], size: tuple[int, int], frames: int) -> bool:
    """Whether a video is static by VBench's rule. ``size``: height and width in pixels; ``frames``:
    their number; ``scores``: frames + 1 flow lengths of :func:`flow_scores`."""
    threshold = 3.0 * (min(size) / 256.0)
    moving_pairs = round(2 * (frames / 16.0))
    if sum(score > threshold for score in scores[:-2]) > moving_pairs:
        return False
    return all(score <= threshold * moving_pairs * 2 for score in scores[-2:])


@dataclass
class StaticFilter:
    """The filter with RAFT of ``weights`` on ``device``. UserError on construction: a file without
    RAFT's weights."""

    weights: Path
    device: torch.device

    def __post_init__(self) -> None:
        self.sha256 = sha256_file(self.weights)
        self.model = load_raft(self.weights).to(self.device)

    def judge(self, path: Path) -> bool:
        """Whether a video stands still."""
        frames = read_video(path).to(self.device)

        def flow(first: Tensor, second: Tensor) -> Tensor:
            return optical_flow(self.model, first, second)

        height, width = frames.shape[-2:]
        return is_static(flow_scores(frames, flow), (height, width), len(frames))

    def choose(self, out: Path, prompt: str, count: int) -> None:
        """Judge a prompt's candidates, put the chosen ones into ``static/`` as 0..4, and record it.

        A record of the same files and weights is used in place of judging again.
        """
        folder = out / CANDIDATES
        names = sorted(video_name(prompt, number) for number in range(count))
        hashes = {name: sha256_file(folder / name) for name in names}
        inputs: Json = {"prompt": prompt, "raft_sha256": self.sha256, "candidates": hashes}
        record_path = _record(out, prompt)
        earlier_record = (
            read_json(record_path, "delete it to filter the prompt again")
            if record_path.is_file()
            else {}
        )
        verdicts: dict[str, bool] = {}
        if {name: earlier_record.get(name) for name in inputs} == inputs:
            verdicts = typed(
                earlier_record.get("judged"),
                dict[str, bool],
                record_path,
                "delete it to filter the prompt again",
            )
        else:
            record_path.unlink(missing_ok=True)
            for name in names:
                verdicts[name] = self.judge(folder / name)
                if sum(verdicts.values()) == VIDEOS_PER_PROMPT:
                    break
        static_names = [name for name in names if verdicts.get(name)][:VIDEOS_PER_PROMPT]
        for number in range(VIDEOS_PER_PROMPT):
            target = out / STATIC / video_name(prompt, number)
            if number < len(static_names):
                _place(folder / static_names[number], target)
            else:
                target.unlink(missing_ok=True)
        write_json(record_path, {**inputs, "judged": verdicts, "chosen": static_names})


def _record(out: Path, prompt: str) -> Path:
    """Path of a prompt's record."""
    return out / RECORDS / f"{video_name(prompt, 0)}.json"


def _place(source: Path, target: Path) -> None:
    """Put ``source`` at ``target``, as a hard link where the disk has them, else as a copy,
    replacing the target at once."""
    with new_file(target) as file:
        try:
            os.link(source, file)
        except OSError:
            shutil.copyfile(source, file)


def run_static_filter(
    out: Path, prompts: Sequence[str], count: int, static: StaticFilter, ranks: Ranks
) -> None:
    """Filter every prompt's candidates, shared among the ranks. Prompts with fewer than five are
    named at the end."""
    for folder in (STATIC, RECORDS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rank_prompts = list(prompts)[ranks.rank :: ranks.world]
    for number, prompt in enumerate(rank_prompts, 1):
        static.choose(out, prompt, count)
        if ranks.is_main:
            say(f"static filter: {number}/{len(rank_prompts)} prompts")
    ranks.barrier()
    short_prompts = [
        f"'{prompt}' ({static_count})"
        for prompt in prompts
        if (static_count := len(chosen_of(out, prompt))) < VIDEOS_PER_PROMPT
    ]
    if ranks.is_main and short_prompts:
        say(
            f"static filter: fewer than {VIDEOS_PER_PROMPT} static videos of "
            f"{len(short_prompts)} prompts: {', '.join(short_prompts[:5])}"
        )


def chosen_of(out: Path, prompt: str) -> list[str]:
    """Names of the candidates that the filter chose. UserError if it has not run."""
    remedy = "run the static filter: vbench_eval/sample.py with raft="
    return read_typed(_record(out, prompt), _Record, remedy).chosen


@dataclass(frozen=True)
class _Record:
    """The field of a prompt's record that is read."""

    chosen: list[str]
