"""Score a model trained from scratch as a video predictor: true first frames in, the rest
generated, real metrics.

    deepspeed recipes/evaluate_prediction.py checkpoint=runs/scd_b tokenizer=DIR pixels.kind=teco pixels.root=DATA \\
        pixels.split=test protocol=minecraft-fvd out=runs/scd_b/fvd

LPIPS and I3D need ``scd weights metrics`` once. ``checkpoint=reconstruction`` scores the
tokenizer's own reconstructions (no model can do better), ``checkpoint=repeat`` the last true frame
held still. Clips are shared over the ranks and kept in ``out/clips``: the same command goes on
where it stopped. ``out`` gets result.json (protocol, seeds, counts, weights' hashes, figures,
curves per frame), cost.json (block passes, seconds per frame) and a few videos, truth beside
prediction.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console
from torch import Tensor

from scd_sf.checkpoint import git_revision, versions, weights_sha256
from scd_sf.config import from_command_line, stored_settings
from scd_sf.data.clips import write_video
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.data.sources.pixels import PixelClip, PixelClips
from scd_sf.diffusion.samplers import MOST_STEPS, Sampler, build_sampler
from scd_sf.distributed import Ranks, init_distributed
from scd_sf.evaluation.frames import SsimWindow
from scd_sf.evaluation.i3d import TORCHSCRIPT_SHA256
from scd_sf.evaluation.prediction import PredictionConfig, load_predictor, predict
from scd_sf.evaluation.prediction_metrics import MetricNetworks, PredictionScorer
from scd_sf.evaluation.prediction_protocols import PredictionProtocol, named_protocol
from scd_sf.evaluation.prediction_result import prediction_table
from scd_sf.evaluation.timing import Cost, time_in_rounds, unrest
from scd_sf.files import Json, locked, read_json, require_own_folder, sha256_folder, write_json
from scd_sf.generation.generate import as_uint8
from scd_sf.generation.request import choose_sampler
from scd_sf.models.build import Student
from scd_sf.models.tokenizers.tokenizer import load_tokenizer
from scd_sf.nn.layers import DitBlock
from scd_sf.types import Conditioning, Tokenizer, UserError, check_within, exit_on_user_error, say

FREE = (
    "out",
    "real",
    "batch",
    "videos",
    "timed",
    "checkpoint",
    "tokenizer",
    "metrics",
    "i3d_torchscript",
)  # fields that may differ when a run goes on
CONTROLS = ("reconstruction", "repeat")


@dataclass
class SamplerChoice:
    """The sampler, where it is not the checkpoint's own."""

    name: str = ""
    """euler, unipc or renoise; empty: the checkpoint's."""
    steps: int = 0
    """Denoising steps per frame; 0: the checkpoint's."""

    def __post_init__(self) -> None:
        check_within(self, {"steps": (0, MOST_STEPS)}, "sampler.")


@dataclass
class CustomProtocol:
    """For ``protocol=custom``: smaller than the published protocols, and labelled so."""

    context: int = 8
    """True frames that the model sees."""
    generated: int = 24
    """Frames that it predicts after them."""
    clips: int = 16
    """Clips that are predicted."""
    resolution: int = 128
    """Pixels along a side."""
    seeds: tuple[int, ...] = (0,)
    """One prediction of each clip per seed."""


@dataclass
class EvaluatePredictionConfig:
    """What is predicted, and how it is measured."""

    checkpoint: str
    """A run directory, or one step_N of it."""
    tokenizer: str
    """Directory of the tokenizer that encoded the training data."""
    out: str
    """Folder for result.json, the table and the videos."""
    pixels: PixelsConfig
    """The true clips."""
    weights: str = "ema"
    """Which weights of the checkpoint: ema, model or best."""
    protocol: str = "custom"
    """Name of a published protocol (scd_sf/evaluation/prediction_protocols.py), or custom."""
    custom: CustomProtocol = field(default_factory=CustomProtocol)
    """The protocol where ``protocol`` is custom."""
    sampler: SamplerChoice = field(default_factory=SamplerChoice)
    """The sampler, where it is not the checkpoint's own."""
    rollout: PredictionConfig = field(default_factory=PredictionConfig)
    """History and guidance while predicting."""
    batch: int = 8
    """Clips predicted together."""
    networks: bool = True
    """Measure with networks (LPIPS, FVD), too; false: PSNR and SSIM alone."""
    fvd: bool = True
    """Measure FVD; false: I3D is not needed."""
    metrics: str = ""
    """Folder with the weights of LPIPS and I3D; empty: where ``scd weights metrics`` puts them."""
    real: str = ""
    """Folder that keeps I3D's features of the true clips for other evaluations; empty: nowhere."""
    i3d_torchscript: str = ""
    """StyleGAN-V's i3d_torchscript.pt, whose FVD is that of FAR and SCD; empty: the I3D of
    ``metrics``."""
    i3d_sha256: str = TORCHSCRIPT_SHA256
    """sha256 of the file ``i3d_torchscript``, which is a program: another file is not run."""
    far_compat: bool = False
    """Measure as the release of FAR and SCD does."""
    ssim: SsimWindow = "valid"
    """Pixels that SSIM counts: valid (TECO's way) or padded (FAR's; always with ``far_compat``)."""
    videos: int = 4
    """Clips that are written as mp4; 0: none."""
    timed: int = 8
    """Frames generated at batch 1 for the timing, with seconds and memory of each; 0: no timing."""

    def __post_init__(self) -> None:
        self.rules()  # UserError for a protocol that does not exist
        if self.protocol != "custom" and self.custom != CustomProtocol():
            raise UserError(
                f"custom is for protocol=custom, and protocol is {self.protocol}: leave one of them out"
            )
        if self.batch < 1 or min(self.videos, self.timed) < 0:
            raise UserError(
                f"batch {self.batch} must be >= 1, videos {self.videos} and timed {self.timed} >= 0"
            )
        if self.i3d_torchscript and not (self.networks and self.fvd):
            raise UserError(
                "i3d_torchscript is for FVD, which networks=false or fvd=false leaves out: drop one of them"
            )

    def rules(self) -> PredictionProtocol:
        """The protocol that ``protocol`` names, or ``custom``. UserError: there is none."""
        if self.protocol == "custom":
            return PredictionProtocol.custom(**vars(self.custom), ssim=self.ssim)
        return dataclasses.replace(named_protocol(self.protocol), ssim=self.ssim)

    def metric_networks(self, device: torch.device) -> MetricNetworks:
        """LPIPS and I3D on ``device``, as far as ``networks`` and ``fvd`` ask for them."""
        if not self.networks:
            return MetricNetworks()
        folder = Path(self.metrics) if self.metrics else None
        program = Path(self.i3d_torchscript) if self.i3d_torchscript and self.fvd else None
        networks = MetricNetworks.load(folder, device, torchscript=program, sha256=self.i3d_sha256)
        if not self.fvd:
            return MetricNetworks(networks.lpips, None, networks.weights)
        return networks.keeping(Path(self.real)) if self.real else networks


@dataclass
class Evaluation:
    """The clips, the model and the sampler of an evaluation. ``model`` None: a control."""

    cfg: EvaluatePredictionConfig
    rules: PredictionProtocol
    clips: PixelClips
    tokenizer: Tokenizer
    model: Student | None
    sampler: Sampler
    device: torch.device

    def read(self, index: int) -> PixelClip:
        """The protocol's frames of a clip. UserError: it is shorter, or of another size."""
        clip = self.clips.read(index)
        first, frames, side = self.rules.first_frame, self.rules.frames, self.rules.resolution
        if clip.frames < first + frames or tuple(clip.frames_F3HW.shape[1:]) != (3, side, side):
            raise UserError(
                f"{clip.id}: {tuple(clip.frames_F3HW.shape)}; the protocol needs {frames} frames of {side}x{side}: "
                "choose other clips, or pixels.size"
            )
        actions = None if clip.actions_F is None else clip.actions_F[first : first + frames]
        return PixelClip(clip.id, clip.frames_F3HW[first : first + frames], actions, clip.label)

    def conditions(self, clips: Sequence[PixelClip]) -> Conditioning:
        """Actions and labels of the clips, on the device."""
        actions = [clip.actions_F for clip in clips if clip.actions_F is not None]
        labels = [clip.label for clip in clips if clip.label is not None]
        conditions = Conditioning.of_frames(
            len(clips),
            torch.stack(actions) if actions else None,
            torch.tensor(labels) if labels else None,
        )
        return conditions.to(self.device)

    def futures(self, clips: Sequence[PixelClip], numbers: Sequence[int], seed: int) -> Tensor:
        """Predicted frames (B, generated, 3, H, W) in [0, 1] of one trajectory."""
        pixels = torch.stack([clip.frames_F3HW for clip in clips]).float() / 127.5 - 1
        context, truth = pixels.split([self.rules.context, self.rules.generated], 1)
        if self.model is not None:
            latents = torch.cat(list(self.latents(clips, numbers, seed, context)), 1)
        elif self.cfg.checkpoint == "repeat":
            return (context[:, -1:].expand_as(truth) + 1) / 2
        else:
            latents = self.tokenizer.encode(truth)
        return (self.tokenizer.decode(latents.float().cpu()).clamp(-1, 1) + 1) / 2

    def latents(
        self,
        clips: Sequence[PixelClip],
        numbers: Sequence[int],
        seed: int,
        context_BF3HW: Tensor,
        frames: int = 0,
    ) -> Iterator[Tensor]:
        """Yields generated latents (B, 1, C, H, W), ``frames`` of them (0: the protocol's number).
        A trajectory's noise depends on clip and seed, not on the batch."""
        assert self.model is not None
        context_latents = self.tokenizer.encode(context_BF3HW).to(self.device)
        seeds = [1_000_003 * seed + number for number in numbers]
        count = frames or self.rules.generated
        return predict(
            self.model,
            context_latents,
            self.conditions(clips),
            count,
            self.sampler,
            seeds,
            self.cfg.rollout,
        )


def build(cfg: EvaluatePredictionConfig, ranks: Ranks, checkpoint: Path | None) -> Evaluation:
    """The evaluation of a checkpoint (None: a control). UserError: clips, tokenizer and model do not
    fit."""
    rules, clips = cfg.rules(), open_pixels(cfg.pixels)
    if rules.clips > len(clips):
        raise UserError(
            f"{cfg.pixels.root}: {len(clips)} clips, the protocol has {rules.clips}: use custom.clips"
        )
    tokenizer = load_tokenizer(Path(cfg.tokenizer))
    if checkpoint is None:
        if cfg.checkpoint == "repeat" and not rules.context:
            raise UserError("checkpoint=repeat holds the last true frame: the protocol has none")
        return Evaluation(
            cfg, rules, clips, tokenizer, None, build_sampler("euler", 1, 1.0), ranks.device
        )
    model, description = load_predictor(checkpoint, cfg.weights)
    dit = description.model.dit
    checkpoint_sampler = description.sampler
    if tokenizer.channels != dit.in_channels:
        raise UserError(
            f"{cfg.tokenizer}: {tokenizer.channels} channels, the model takes {dit.in_channels}; use its own"
        )
    if dit.num_actions and clips.num_actions != dit.num_actions:
        raise UserError(
            f"{cfg.pixels.root}: {clips.num_actions} actions, the model knows {dit.num_actions}"
        )
    config_sampler = dataclasses.replace(
        checkpoint_sampler,
        name=cfg.sampler.name or checkpoint_sampler.name,
        steps=cfg.sampler.steps or checkpoint_sampler.steps,
        times=(),
    )
    sampler = choose_sampler(checkpoint_sampler, config_sampler, cfg.checkpoint).build()
    return Evaluation(cfg, rules, clips, tokenizer, model.to(ranks.device), sampler, ranks.device)


def claim(cfg: EvaluatePredictionConfig, ranks: Ranks, checkpoint: Path | None) -> None:
    """Write the weights' hashes and the settings into ``out``. UserError: it was begun with
    others."""
    settings: Json = {
        name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE
    }
    if checkpoint is not None:
        settings["weights_sha256"] = weights_sha256(checkpoint, cfg.weights)
    settings["tokenizer_sha256"] = sha256_folder(Path(cfg.tokenizer))
    path = Path(cfg.out) / "generation.json"
    new_settings = json.loads(json.dumps(settings))
    if path.is_file():
        stored = read_json(path, "choose another out=")
        old_settings = stored_settings(EvaluatePredictionConfig, stored, str(path))
        names = [name for name in new_settings if old_settings.get(name) != new_settings[name]]
        unknown_names = old_settings.keys() - new_settings.keys() - set(FREE)
        if names or unknown_names:
            changed = ", ".join(sorted(names)) or "configuration"
            raise UserError(f"{path}: begun with another {changed}; choose another out=")
    ranks.barrier()
    if ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, new_settings)


def score(bench: Evaluation, scorer: PredictionScorer, ranks: Ranks) -> None:
    """Score this rank's share of the clips, ``batch`` at a time; every scored clip is kept on
    disk."""
    cfg, rules = bench.cfg, bench.rules
    out = Path(cfg.out)
    scored_numbers = scorer.resume(out / "clips")
    clip_numbers = [
        number
        for number in range(rules.clips)[ranks.rank :: ranks.world]
        if number not in scored_numbers
    ]
    for start in range(0, len(clip_numbers), cfg.batch):
        numbers = clip_numbers[start : start + cfg.batch]
        start_time = time.monotonic()
        clips = [bench.read(number) for number in numbers]
        trajectories = [bench.futures(clips, numbers, seed) for seed in rules.seeds]
        for row, number in enumerate(numbers):
            truth = clips[row].frames_F3HW.float() / 255
            figures = scorer.add(number, truth, [videos[row] for videos in trajectories])
            if number < cfg.videos:
                prediction = torch.cat([truth[: rules.context], trajectories[0][row]])
                side_by_side = as_uint8(torch.cat([truth, prediction], dim=-1))
                (out / "videos").mkdir(parents=True, exist_ok=True)
                write_video(out / "videos" / f"{number:05d}.mp4", side_by_side, bench.clips.fps)
            scorer.save(figures, out / "clips")  # last, as a clip with figures is not scored again
        end = start + len(numbers)
        seconds_per_clip = (time.monotonic() - start_time) / len(numbers)
        seconds_left = (len(clip_numbers) - end) * seconds_per_clip
        if ranks.is_main:
            say(f"  scored {end}/{len(clip_numbers)}, left {seconds_left:.0f} s")


def cost(bench: Evaluation) -> dict[str, object]:
    """Block passes and seconds per frame at batch 1, without the tokenizer, over ``timed`` frames
    after the context. Empty for a control."""
    model, rules, frames = bench.model, bench.rules, bench.cfg.timed
    if model is None or frames == 0:
        return {}
    clip = bench.read(0)
    context = clip.frames_F3HW[None, : rules.context].float() / 127.5 - 1
    stream = partial(bench.latents, [clip], [0], 0, context, min(frames, rules.generated))
    history = Cost(partial(bench.latents, [clip], [0], 0, context, 1), model, DitBlock, 1)
    generation = Cost(stream, model, DitBlock, 1)
    time_in_rounds([history, generation], 3, 60.0)
    count = generation.runs[0].frames
    # The first frame includes the reading of the context; the later ones do not.
    first_seconds = min(run.seconds for run in history.runs)
    all_seconds = min(run.seconds for run in generation.runs)
    later_frames = max(1, count - 1)
    return {
        "frames": count,
        "context": rules.context,
        "block_passes_per_frame": (generation.passes * count - history.passes) / later_frames,
        "seconds_per_frame": (all_seconds - first_seconds) / later_frames,
        "seconds_to_first_frame": first_seconds,
        "by_frame": by_frame(stream, bench.device),
        "machine_busy": unrest({"history": history, "frames": generation}),
        "device": str(bench.device),
        "threads": torch.get_num_threads(),
    }


def by_frame(
    stream: Callable[[], Iterator[Tensor]], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each chunk of frames of one more run, and the GiB in use after it: of the GPU's
    allocator, or of the process on a CPU."""
    seconds: list[float] = []
    memory: list[float] = []
    start = time.perf_counter()
    for _ in stream():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(round(time.perf_counter() - start, 4))
        bytes_in_use = (
            torch.cuda.memory_allocated(device)
            if device.type == "cuda"
            else psutil.Process().memory_info().rss
        )
        memory.append(round(bytes_in_use / 2**30, 4))
        start = time.perf_counter()
    return {"seconds": seconds, "memory_gib": memory}


def write(bench: Evaluation, scorer: PredictionScorer, checkpoint: Path | None) -> None:
    """Write result.json and cost.json, and print the table."""
    cfg, result = bench.cfg, scorer.result()
    out = Path(cfg.out)
    result.write(out / "result.json")
    description: dict[str, object] = {
        "config": dataclasses.asdict(cfg),
        "git": git_revision(),
        "versions": versions(),
    }
    if bench.model is not None:
        description |= {
            "checkpoint": str(checkpoint),
            "sampler": [bench.sampler.name, bench.sampler.steps],
        }
        description["parameters"] = sum(p.numel() for p in bench.model.parameters())
    write_json(out / "cost.json", {**description, **cost(bench)})
    Console(width=140).print(prediction_table({cfg.checkpoint: result}))
    say(f"{out / 'result.json'}, {out / 'videos'}")


def main() -> None:
    cfg = from_command_line(EvaluatePredictionConfig, __doc__ or "")
    ranks = init_distributed()
    checkpoint = (
        None if cfg.checkpoint in CONTROLS else ranks.checkpoint(cfg.checkpoint, cfg.weights)
    )
    bench = build(cfg, ranks, checkpoint)
    networks = cfg.metric_networks(ranks.device)
    bench.read(0)  # UserError for clips that do not fit the protocol
    with ExitStack() as stack:
        ranks.on_main(lambda: require_own_folder(Path(cfg.out), ["generation.json"]))
        ranks.on_main(lambda: stack.enter_context(locked(Path(cfg.out), "scores")))
        claim(cfg, ranks, checkpoint)
        score(bench, PredictionScorer(bench.rules, networks, far_compat=cfg.far_compat), ranks)
        ranks.barrier()
        if ranks.is_main:
            scorer = PredictionScorer(bench.rules, networks, far_compat=cfg.far_compat)
            scorer.resume(Path(cfg.out) / "clips")
            write(bench, scorer, checkpoint)
        ranks.barrier()


if __name__ == "__main__":
    exit_on_user_error(main)
