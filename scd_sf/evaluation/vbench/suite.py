"""The videos that VBench asks for, as one sample folder: ``videos/`` five per prompt,
``flickering/`` the candidates of temporal flickering, ``static/`` those of them that its filter
keeps.

Sampling, seeds, records, ranks and resuming are :mod:`scd_sf.generation.folder`'s.
``manifest.json`` records the settings.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av

from scd_sf.checkpoint import git_revision, versions
from scd_sf.data.prompt_files import PromptRow
from scd_sf.distributed import Ranks
from scd_sf.evaluation.vbench.prompts import (
    FLICKERING,
    VBenchPrompt,
    check_collisions,
    chosen_dimensions,
    is_case_blind,
    load_entries,
    prompts_hash,
    read_extended,
    select,
    video_name,
)
from scd_sf.evaluation.vbench.static_filter import CANDIDATES, StaticFilter, run_static_filter
from scd_sf.files import locked, sha256_file
from scd_sf.generation.folder import make_videos
from scd_sf.generation.sampling import SampleConfig, VideoRequest
from scd_sf.types import UserError

VIDEOS = "videos"
SAMPLES, CANDIDATES_EACH = 5, 25
_SEEDS = {"vbench": "100000 * line + number", "sample": "seed + number"}
_NEEDS_RAFT = (
    "temporal_flickering needs VBench's static filter, and that RAFT's weights: set raft= to raft-things.pth (in "
    "models.zip of github.com/princeton-vl/RAFT; raft_model/models/raft-things.pth of VBench's cache) or torchvision's "
    "raft_large_C_T_V1-22a6c225.pth; or filter=false to make only the candidates now; or leave the dimension out"
)


@dataclass
class SuiteConfig:
    """Videos for VBench: which prompts, how many, which seeds."""

    sampling: SampleConfig
    """As ``scd sample``, without prompts, start and samples."""
    full_info: str = ""
    """Another VBench_full_info.json; empty: the list that is shipped."""
    extended: str = ""
    """File whose line k is the prompt that line k of VBench's list is sampled with; empty: VBench's
    own."""
    dimensions: list[str] = field(default_factory=list)
    """Only prompts of these; empty: all."""
    samples: int = SAMPLES
    """Videos per prompt."""
    flicker_samples: int = CANDIDATES_EACH
    """Candidates per prompt for the static filter of temporal flickering."""
    seeds: Literal["vbench", "sample"] = "vbench"
    """vbench: 100000 i + j for prompt i, sample j (as VBench's authors sampled Wan 2.1); sample:
    sampling.seed + j."""
    raft: str = ""
    """File of RAFT's weights, which the static filter needs: raft-things.pth, or torchvision's
    raft_large."""
    filter: bool = True
    """Apply the static filter; false: leave the candidates as they are."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= SAMPLES or self.flicker_samples < 1:
            raise UserError(
                f"samples is {self.samples}, must be 1..{SAMPLES}; flicker_samples must be at least 1"
            )
        sampling = self.sampling
        for name, is_set in (
            ("prompts", sampling.prompts),
            ("prompt_file", sampling.prompt_file),
            ("start", sampling.start),
            ("video", sampling.video),
            ("strength", sampling.strength is not None),
            ("history", sampling.history != "keep"),
            ("samples", sampling.samples != 1),
            ("seed", sampling.seed and self.seeds == "vbench"),
        ):
            if is_set:
                raise UserError(f"sampling.{name} is set, but the suite decides it; leave it out")
        if sampling.decoder:
            raise UserError(
                "sampling.decoder is set, but a tiny decoder is for previews, not for scores; leave it out"
            )


def suite_videos(cfg: SuiteConfig, entries: list[VBenchPrompt]) -> list[VideoRequest]:
    """Every video of the chosen dimensions, each prompt once. Their names are checked, also for
    collisions."""
    names = chosen_dimensions(cfg.dimensions)
    wordings = (
        read_extended(Path(cfg.extended), entries)
        if cfg.extended
        else [entry.prompt for entry in entries]
    )
    other_entries = select(entries, [name for name in names if name != FLICKERING])
    parts = [(VIDEOS, other_entries, cfg.samples)]
    if FLICKERING in names:
        parts.append((CANDIDATES, select(entries, [FLICKERING]), cfg.flicker_samples))
    videos = []
    for folder, folder_entries, count in parts:
        for entry in folder_entries:
            for number in range(count):
                base = 100_000 * entry.line if cfg.seeds == "vbench" else cfg.sampling.seed
                file = f"{folder}/{video_name(entry.prompt, number)}"
                videos.append(
                    VideoRequest(
                        file,
                        PromptRow(wordings[entry.line]),
                        entry.line,
                        number,
                        base + number,
                        entry.prompt,
                    )
                )
    out = Path(cfg.sampling.out)
    check_collisions([video.file for video in videos], out, case_blind=is_case_blind(out))
    return videos


def run_suite(cfg: SuiteConfig, ranks: Ranks) -> None:
    """Check the settings, make the videos and apply the static filter. All ranks call it; the same
    command resumes it. UserError: settings that do not fit, or missing weights of RAFT."""
    entries = load_entries(cfg.full_info)
    videos = suite_videos(cfg, entries)
    candidates = [entry.prompt for entry in select(entries, [FLICKERING])]
    needs_filter = cfg.filter and any(video.file.startswith(f"{CANDIDATES}/") for video in videos)
    if needs_filter and not cfg.raft:
        raise UserError(_NEEDS_RAFT)
    static_filter = StaticFilter(Path(cfg.raft), ranks.device) if needs_filter else None
    manifest_entries: dict[str, object] = {
        "suite": {
            "name": "VBench",
            "prompts_sha256": prompts_hash(entries),
            "extended_sha256": sha256_file(Path(cfg.extended)) if cfg.extended else None,
            "seeds": _SEEDS[cfg.seeds],
        }
    }
    make_videos(cfg.sampling, ranks, videos, manifest_entries, {"protocol": protocol(cfg)})
    if static_filter is not None:
        out = Path(cfg.sampling.out)
        with locked(out, "this suite") if ranks.is_main else nullcontext():
            run_static_filter(out, candidates, cfg.flicker_samples, static_filter, ranks)


def protocol(cfg: SuiteConfig) -> dict[str, object]:
    """The protocol of the manifest, which a comparison needs beside its ``settings`` (sampler,
    steps, shift, size, fps, crf, prompt hash)."""
    w = cfg.sampling.guidance.text.w
    return {
        "dimensions": chosen_dimensions(cfg.dimensions),
        "samples_per_prompt": cfg.samples,
        "flickering_candidates": cfg.flicker_samples,
        "extended_prompts": Path(cfg.extended).name if cfg.extended else None,
        "guidance": {
            "standard_w": w,
            "additive_s": w - 1.0,
            "corruption": cfg.sampling.guidance.corruption,
        },
        "static_filter": cfg.filter,
        "versions": versions() | {"av": av.__version__},
        "git_revision": git_revision(),
    }
