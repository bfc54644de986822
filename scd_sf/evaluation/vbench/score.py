"""Score a folder of videos with VBench in an environment of its own: one dimension after another,
each resumable.

A dimension's videos are shared by VBench's ranks (one per GPU). Its result,
``OUT/<dimension>.json``, is valid as long as its videos and VBench are the same.
``OUT/summary.json`` is what aggregate and report read.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scd_sf.evaluation.vbench import weights
from scd_sf.evaluation.vbench.aggregate import check_fractions
from scd_sf.evaluation.vbench.environment import build, default_folder, examine
from scd_sf.evaluation.vbench.prompts import (
    FLICKERING,
    VBenchPrompt,
    chosen_dimensions,
    load_entries,
    prompts_hash,
    video_name,
)
from scd_sf.evaluation.vbench.static_filter import CANDIDATES, STATIC, chosen_of
from scd_sf.evaluation.vbench.suite import CANDIDATES_EACH, SAMPLES, VIDEOS
from scd_sf.files import (
    Json,
    locked,
    parse_json,
    read_json,
    read_text,
    read_typed,
    require_own_folder,
    typed,
    write_json,
    write_text,
)
from scd_sf.generation.folder import INDEX
from scd_sf.types import UserError, say

_WORKER = Path(__file__).with_name("worker.py")
_UNPICKLING = "Weights only load failed"


@dataclass
class ScoreConfig:
    """Which videos are scored, and by which VBench."""

    videos: str
    """Folder that vbench_eval/sample.py made, or any folder of ``{prompt}-{i}.mp4`` (those of
    temporal flickering count as filtered)."""
    out: str = ""
    """Folder for the results; empty: ``scores`` in the folder of the videos."""
    python: str = ""
    """A Python that has VBench; empty: an environment is built in ``env``."""
    env: str = ""
    """Folder of the environment that is built; empty: one in the user's cache."""
    torch: str = "torch"
    """pip requirement of torch for the environment."""
    detectron2: str = ""
    """pip requirement of detectron2 for the environment; empty: none, and the dimensions that need
    it fail."""
    cache: str = ""
    """Folder of VBench's weights; empty: $VBENCH_CACHE_DIR or ~/.cache/vbench."""
    download: bool = False
    """VBench may fetch missing weights."""
    dimensions: list[str] = field(default_factory=list)
    """Only these; empty: all 16."""
    samples: int = SAMPLES
    """Videos per prompt that are scored."""
    gpus: int = -1
    """Number of GPUs; 0: the CPU; -1: all."""
    unfiltered: bool = False
    """Temporal flickering of the first candidates, without the static filter."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= SAMPLES:
            raise UserError(f"samples is {self.samples}; it must be 1..{SAMPLES}")
        if self.gpus < -1:
            raise UserError(
                f"gpus is {self.gpus}; it must be the number of GPUs, 0 for the CPU, or -1 for all"
            )


@dataclass(frozen=True)
class Job:
    """One dimension to score. ``videos``: line of VBench's list -> files; ``reduced``: reasons why
    they are not VBench's whole set."""

    dimension: str
    videos: dict[int, list[Path]]
    reduced: list[str]

    @property
    def files(self) -> list[Path]:
        return [file for files in self.videos.values() for file in files]


def collect(root: Path, name: str, entries: Sequence[VBenchPrompt], cfg: ScoreConfig) -> Job:
    """The job of a dimension with the videos it needs. UserError if one is missing, because VBench
    would leave it out of the mean."""
    prompts = [entry for entry in entries if name in entry.dimensions]
    is_sample_folder = (root / VIDEOS).is_dir() or (root / CANDIDATES).is_dir()
    folder = root / VIDEOS if is_sample_folder else root
    reduced: list[str] = []
    counts = {entry.line: cfg.samples for entry in prompts}
    if cfg.samples < SAMPLES:
        reduced.append(f"{cfg.samples} instead of {SAMPLES} videos per prompt")
    if name == FLICKERING and cfg.unfiltered:
        folder = root / CANDIDATES if is_sample_folder else root
        reduced.append("temporal flickering without the static filter")
    elif name == FLICKERING and is_sample_folder:
        folder = root / STATIC
        counts = {
            entry.line: min(cfg.samples, len(chosen_of(root, entry.prompt))) for entry in prompts
        }
        short_count = sum(count < cfg.samples for count in counts.values())
        if short_count:
            reason = f"{short_count} of {len(prompts)} prompts have fewer than {cfg.samples} static videos"
            reduced.append(f"temporal flickering: {reason}")
    videos = {
        entry.line: [
            folder / video_name(entry.prompt, number) for number in range(counts[entry.line])
        ]
        for entry in prompts
    }
    missing_files = [file for files in videos.values() for file in files if not file.is_file()]
    if missing_files:
        raise UserError(
            f"{folder}: {len(missing_files)} videos of {name} are missing, such as "
            f"'{missing_files[0].name}'; sample them, set samples= to what is there of every prompt, "
            "or name other dimensions"
        )
    if not any(videos.values()):
        raise UserError(
            f"{folder}: no video of {name} stands still by VBench's filter; unfiltered=true takes any"
        )
    return Job(name, videos, reduced)


def run_score(cfg: ScoreConfig) -> dict[str, float]:
    """Score the videos and return the scores of all dimensions that the folder of results has.
    UserError, before any work, for missing videos, weights or packages."""
    root = Path(cfg.videos).absolute()
    names = chosen_dimensions(cfg.dimensions)
    entries = load_entries()
    if not root.is_dir():
        raise UserError(f"videos {root}: no such folder; sample with vbench_eval/sample.py")
    _refuse_previews(root)
    jobs = [collect(root, name, entries, cfg) for name in names]
    cache = Path(
        cfg.cache or os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench"
    ).absolute()
    if not cfg.download:
        weights.require_weights(names, cache)
    if cfg.python:
        python = Path(cfg.python).absolute()
    else:
        env = Path(cfg.env) if cfg.env else default_folder()
        python = build(env, cfg.torch, cfg.detectron2).absolute()
    environment = examine(python)
    detectron2_names = [name for name in names if name in weights.DETECTRON2]
    if detectron2_names and not environment.detectron2:
        raise UserError(
            f"{python}: has no detectron2, which {', '.join(detectron2_names)} need; set detectron2="
            "git+https://github.com/facebookresearch/detectron2.git (it is compiled), or name other dimensions"
        )
    info = _full_info(Path(environment.folder), entries)
    out = Path(cfg.out).absolute() if cfg.out else root / "scores"
    require_own_folder(out, ["work"])
    cache.mkdir(parents=True, exist_ok=True)
    weights.link_dino(cache)
    gpus = torch.cuda.device_count() if cfg.gpus == -1 else cfg.gpus
    vbench = VBench(python, cache, gpus, cfg.download, info)
    with locked(out, "these scores"):
        (out / "work").mkdir(exist_ok=True)
        for number, job in enumerate(jobs, 1):
            _score(job, vbench, out, f"{number}/{len(jobs)} {job.dimension}")
        return _summarise(root, out, environment.versions)


def _refuse_previews(root: Path) -> None:
    """UserError for videos that a tiny decoder decoded."""
    manifest = read_json(root / INDEX, "sample again") if (root / INDEX).is_file() else {}
    settings = manifest.get("settings")
    if isinstance(settings, dict) and settings.get("decoder"):
        raise UserError(
            f"{root / INDEX}: the videos were made with decoder {settings['decoder']}, which is for previews, "
            "not for scores; sample again without it"
        )


def _full_info(folder: Path, entries: Sequence[VBenchPrompt]) -> list[Json]:
    """VBench's own list, with further fields that some dimensions read. UserError unless its
    prompts are ``entries``."""
    file, remedy = folder / "VBench_full_info.json", "install VBench again"
    if prompts_hash(load_entries(str(file))) != prompts_hash(entries):
        raise UserError(f"{file}: not the prompts of the release; {remedy}")
    return typed(parse_json(read_text(file, remedy), file, remedy), list[Json], file, remedy)


def _score(job: Job, vbench: VBench, out: Path, progress: str) -> None:
    """Score one dimension and write its result, unless that exists for the same videos."""
    result = out / f"{job.dimension}.json"
    inputs = {str(file): stamp(file) for file in job.files}
    if result.is_file() and read_json(result, "delete it to score again").get("inputs") == inputs:
        say(f"[{progress}] finished before")
        return
    device = f"{vbench.gpus} GPUs" if vbench.gpus else "the CPU"
    say(f"[{progress}] {len(job.files)} videos on {device}")
    score, videos = vbench.compute(job, out / "work")
    record: Json = {
        "dimension": job.dimension,
        "score": score,
        "count": len(job.files),
        "videos": videos,
    }
    write_json(result, {**record, "reduced": job.reduced, "inputs": inputs})
    say(f"[{progress}] {score:.6f}")


def stamp(file: Path) -> list[int]:
    """Size in bytes and time of change in ns of a video, [] if it is missing; a score is valid
    while they are the same."""
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class VBench:
    """VBench in its own ``python``, on ``gpus`` GPUs (0: the CPU), with weights in ``cache``.
    ``info``: VBench's list of prompts."""

    python: Path
    cache: Path
    gpus: int
    download: bool
    info: Sequence[Json]

    def compute(self, job: Job, work: Path) -> tuple[float, list[Json]]:
        """The score of the dimension and a row for each video. UserError when VBench fails, or
        leaves out videos that it cannot read.

        Only color may leave out videos, those without the object.
        """
        videos_list = work / f"{job.dimension}-list.json"
        raw_result = work / f"{job.dimension}-raw.json"
        log = work / f"{job.dimension}.log"
        rows = [
            {**self.info[line], "video_list": [str(file) for file in files]}
            for line, files in job.videos.items()
        ]
        write_text(videos_list, json.dumps(rows))
        raw_result.unlink(missing_ok=True)
        self._run(job.dimension, [str(videos_list), str(raw_result)], log)
        answer = read_typed(raw_result, _Answer, f"see {log}")
        check_fractions({job.dimension: answer.score}, str(log))
        scored_paths = {str(row.get("video_path")) for row in answer.videos}
        missing_files = [file for file in job.files if str(file) not in scored_paths]
        if missing_files and job.dimension != "color":
            raise UserError(
                f"{job.dimension}: VBench could not read {len(missing_files)} videos, "
                f"such as {missing_files[0]}; see {log}"
            )
        return answer.score, [
            {**row, "video_path": Path(str(row["video_path"])).name} for row in answer.videos
        ]

    def _run(self, dimension: str, files: list[str], log: Path) -> None:
        """Run the worker, under torchrun for several GPUs, in the cache, where VBench finds its
        folder ``bert-base-uncased``. UserError when it fails."""
        command = [
            str(self.python),
            "-I",
            str(_WORKER),
            dimension,
            "cuda" if self.gpus else "cpu",
            *files,
        ]
        if self.gpus > 1:
            ranks = ["--standalone", "--nproc_per_node", str(self.gpus), "--no-python"]
            command = [str(self.python), "-I", "-m", "torch.distributed.run", *ranks, *command]
        environ = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
        }
        environ |= {
            "VBENCH_CACHE_DIR": str(self.cache),
            "TORCH_HOME": str(self.cache / "torch_home"),
        }
        if not self.download:
            environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command,
                cwd=self.cache,
                env=environ,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            text = log.read_text(encoding="utf-8", errors="replace")
            remedy = "correct that and run the same command again"
            if _UNPICKLING in text:
                remedy = "a weights file of VBench is unpickled whole: build with torch='torch<2.6' and another env="
            last_line = text.strip().rpartition("\n")[2].strip()[:200]
            raise UserError(
                f"{dimension}: VBench ended with code {code} ({last_line}); see {log}; {remedy}"
            )


@dataclass(frozen=True)
class _Answer:
    """The JSON file that the worker writes."""

    score: float
    videos: list[Json]


@dataclass(frozen=True)
class _Result(_Answer):
    """``OUT/<dimension>.json``; ``inputs``: video -> its :func:`stamp`."""

    inputs: dict[str, list[int]] = field(default_factory=dict)
    reduced: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Protocol:
    """The field of a manifest's protocol that is read."""

    flickering_candidates: int = CANDIDATES_EACH


def _summarise(root: Path, out: Path, versions: dict[str, str]) -> dict[str, float]:
    """Write ``summary.json`` and VBench's own form of it, from all dimensions that have a result in
    ``out`` for the present videos. Returns their scores."""
    results: dict[str, _Result] = {}
    for name in chosen_dimensions([]):
        if (out / f"{name}.json").is_file():
            result = read_typed(out / f"{name}.json", _Result, "score it again")
            if result.inputs and all(
                stamp(Path(file)) == recorded_stamp
                for file, recorded_stamp in result.inputs.items()
            ):
                results[name] = result
            else:
                say(
                    f"{name}: left out of the summary, its videos have changed since; score it again"
                )
    scores = {name: result.score for name, result in results.items()}
    check_fractions(scores, str(out))
    reasons = [line for result in results.values() for line in result.reduced]
    manifest = read_json(root / INDEX, "sample again") if (root / INDEX).is_file() else {}
    protocol = manifest.get("protocol")
    if isinstance(protocol, dict) and FLICKERING in scores:
        candidates = typed(protocol, _Protocol, root / INDEX, "sample again").flickering_candidates
        if candidates < CANDIDATES_EACH:
            reasons.append(f"{candidates} instead of {CANDIDATES_EACH} candidates")
    summary = {
        "scores": scores,
        "reduced": list(dict.fromkeys(reasons)),
        "videos": str(root),
        "protocol": {"settings": manifest.get("settings"), "sampling": protocol},
        "environment": versions,
    }
    write_json(out / "summary.json", summary)
    write_json(
        out / "vbench_eval_results.json",
        {name: [result.score, result.videos] for name, result in results.items()},
    )
    return scores
