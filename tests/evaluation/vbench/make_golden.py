"""Writes ``golden.json`` beside it by VBench's own functions, in VBench's own environment; not run
by the tests.

    python vbench_eval/score.py ...        # builds the environment once
    VBENCH_ENV/bin/python -I tests/evaluation/vbench/make_golden.py tests/evaluation/vbench

``flickering.mp4`` is a rendered clip of the demo's world (64x64, 9 frames).
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from easydict import EasyDict
from vbench.cli.static_filter import StaticFilter
from vbench.temporal_flickering import cal_score
from vbench.third_party.RAFT.core.raft import RAFT
from vbench.third_party.RAFT.core.utils_core.utils import InputPadder


def filled(name: str, like: torch.Tensor) -> torch.Tensor:
    """A weight that depends on its name alone."""
    if like.dtype == torch.int64:
        return torch.zeros_like(like)
    drawn = torch.randn(
        like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
    )
    return drawn.abs() + 0.5 if name.endswith("running_var") else drawn * 0.05


def main(folder: Path) -> None:
    model = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
    state = {name: filled(name, value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    rng = torch.Generator().manual_seed(0)
    one = torch.rand(1, 3, 132, 141, generator=rng) * 255
    two = one.roll(3, -1)
    with torch.no_grad():
        flow = model(*InputPadder(one.shape).pad(one, two), iters=2, test_mode=True)[1]
    cases, rule = [], StaticFilter.__new__(StaticFilter)
    for number in range(40):
        frames = [5, 16, 33, 81][number % 4]
        size = (64 + 8 * number, 480)
        rule.set_params(torch.zeros(1, 3, *size), frames)
        scores = (
            torch.rand(frames + 1, generator=rng)
            * rule.params["thres"]
            * [1.05, 1.2, 0.9, 3][number // 4 % 4]
        )
        scores[-2:] *= [1, 10, 30][number % 3]
        values = [round(float(score), 4) for score in scores]
        cases.append(
            {
                "frames": frames,
                "size": size,
                "scores": values,
                "static": bool(rule.check_static(values)),
            }
        )
    golden = {
        "flickering": cal_score(str(folder / "flickering.mp4")),
        "raft": {"shapes": {name: list(value.shape) for name, value in state.items()}},
        "flow": {"shape": list(flow.shape), "values": flow[0, :, ::36, ::36].flatten().tolist()},
        "static": cases,
    }
    (folder / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
