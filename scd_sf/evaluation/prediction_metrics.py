"""Scoring a video prediction model clip by clip: PSNR, SSIM, LPIPS, MSE per frame, and FVD, under a
stated protocol.

    scorer = PredictionScorer(named_protocol("ucf101"), MetricNetworks.load(device="cuda"))
    done = scorer.resume(folder)                               # clips that an earlier run left in ``folder``
    for clip in set(range(scorer.protocol.clips)) - done:      # or a rank's share of them
        scorer.save(scorer.add(clip, reference, (generate(clip, seed) for seed in scorer.protocol.seeds)), folder)
    scorer.result().write(path)

Videos are float tensors in [0, 1]. Only the figures per frame and the features of a clip stay in
memory. Letters: F frames, H W pixels, T trajectories, N clips, D features.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from scd_sf.data.clips import read_video, write_video
from scd_sf.evaluation.frames import (
    SsimWindow,
    bootstrap,
    check_videos,
    mse_frames,
    spread,
    ssim_frames,
)
from scd_sf.evaluation.fvd import FeatureCache, FeatureExtractor, frechet_distance
from scd_sf.evaluation.i3d import TORCHSCRIPT_SHA256, I3dFeatures, TorchscriptFeatures
from scd_sf.evaluation.lpips import Lpips, Trunk
from scd_sf.evaluation.prediction_protocols import PredictionProtocol
from scd_sf.evaluation.prediction_result import MEASURES, PredictionFigure, PredictionResult
from scd_sf.files import foreign, hash_json, typed, write_tensors
from scd_sf.types import UserError

TORCHSCRIPT = "i3d_torchscript"  # its name among the weights of a result
CEILING = 100.0  # dB, of a frame without error (or with less than this)
RESAMPLES = 20
FAR_FPS, FAR_CRF = 8, 25  # imageio's default quality for libx264


@dataclass(frozen=True)
class MetricNetworks:
    """The networks of the metrics; a metric whose network is None is not measured. ``weights``:
    name -> sha256, for the results. ``real``: extractor of the true clips' features, which may
    store them; None: ``features``."""

    lpips: Lpips | None = None
    features: FeatureExtractor | None = None
    weights: dict[str, str] = field(default_factory=dict)
    real: FeatureExtractor | None = None

    def keeping(self, folder: Path) -> MetricNetworks:
        """The same networks, with the features of true clips stored in ``folder``."""
        if self.features is None:
            return self
        return replace(self, real=FeatureCache(self.features, folder, hash_json(self.weights)))

    @classmethod
    def load(
        cls,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        trunk: Trunk = "alex",
        torchscript: Path | None = None,
        sha256: str = TORCHSCRIPT_SHA256,
    ) -> MetricNetworks:
        """LPIPS (the papers use Alex) and I3D of ``scd weights metrics``; with ``torchscript`` the
        I3D of that file, a program, which must have the hash ``sha256``. UserError when weights are
        missing."""
        i3d: I3dFeatures | TorchscriptFeatures
        if torchscript is None:
            name, i3d = "i3d", I3dFeatures.load(folder, device)
        else:
            name, i3d = TORCHSCRIPT, TorchscriptFeatures(torchscript, sha256, device)
        lpips = Lpips.load(trunk, folder, device)
        return cls(lpips, i3d, {f"lpips_{trunk}": lpips.sha256, name: i3d.sha256})


@dataclass(frozen=True)
class ClipScore:
    """The figures and features of one clip. ``frames``: measure -> (T, F) fp64 of the generated
    frames. ``fake``: features (T, D) of the trajectories. ``real``: those of the reference, (1, D),
    or (T, D) when it went through a codec with each trajectory. Both are None without a feature
    network."""

    clip: int
    frames: dict[str, Tensor]
    fake: Tensor | None
    real: Tensor | None
    generation_seconds: float
    metric_seconds: float


@dataclass(frozen=True)
class SavedScore:
    """The header of a clip's file: ``key`` of the scorer, and the seconds of generating and of
    measuring."""

    clip: int
    key: str
    seconds: tuple[float, float]


class PredictionScorer:
    """Scores clips one at a time, in any order, and summarises them under ``protocol``."""

    def __init__(
        self, protocol: PredictionProtocol, networks: MetricNetworks, *, far_compat: bool = False
    ) -> None:
        """``far_compat``: measure as FAR and SCD's release do, for comparison with their tables
        only. Sample and reference go side by side through an H.264 file at 8 frames per second,
        LPIPS is fed [0, 1], and SSIM counts padded borders. The figures are close to theirs, not
        bit-equal, because encoder version and preset differ and theirs joins the trajectories in
        one file and may draw a red border around context frames. Their FVD is of StyleGAN-V's
        TorchScript file: with another I3D the result warns that its FVD does not compare."""
        if networks.features is not None and protocol.clips < 2:
            raise UserError(
                f"protocol {protocol.name}: FVD needs 2 clips; give networks without features for 1"
            )
        self.protocol = protocol
        self.networks = networks
        self.far_compat = far_compat
        self.scores: dict[int, ClipScore] = {}
        self.ssim: SsimWindow = "padded" if far_compat else protocol.ssim
        self.key = hash_json([asdict(protocol), networks.weights, far_compat, self.ssim])

    @torch.no_grad()
    def add(self, clip: int, reference: Tensor, samples: Iterable[Tensor]) -> ClipScore:
        """Score one clip: ``reference`` (context + generated, 3, H, W), and for each of the
        protocol's seeds, in their order, a sample (generated, 3, H, W) without the context. Float
        in [0, 1]; sums run on the reference's device.

        ``samples`` may be a generator that makes them on demand; waiting for it is counted as
        generation. Raises UserError for a clip that was scored already or is beyond the protocol,
        and for wrong sizes, counts or values.
        """
        self._check_new(clip)
        self._check_video(reference, self.protocol.frames, f"clip {clip}: the reference")
        rows: list[dict[str, Tensor]] = []
        generation_seconds = metric_seconds = 0.0
        start = time.perf_counter()
        for sample in samples:
            sample_time = time.perf_counter()
            if len(rows) == len(self.protocol.seeds):
                raise UserError(
                    f"clip {clip}: more than {len(rows)} samples; give one for each seed of the protocol"
                )
            self._check_video(
                sample, self.protocol.generated, f"clip {clip}, trajectory {len(rows)}: the sample"
            )
            rows.append(self._measure(reference, sample, first=not rows))
            generation_seconds += sample_time - start
            metric_seconds += time.perf_counter() - sample_time
            start = time.perf_counter()
        if len(rows) != len(self.protocol.seeds):
            raise UserError(
                f"clip {clip}: {len(rows)} samples; the protocol has {len(self.protocol.seeds)} seeds"
            )
        figures = {
            name: torch.stack([row[name] for row in rows if name in row]) for name in rows[0]
        }
        fake, real = figures.pop("fake", None), figures.pop("real", None)
        score = ClipScore(clip, figures, fake, real, generation_seconds, metric_seconds)
        self.add_score(score)
        return score

    def add_score(self, score: ClipScore) -> None:
        """Add the score of a clip (of another rank, say). UserError when the clip was scored
        already, or a value is not finite."""
        self._check_new(score.clip)
        for name, values in (*score.frames.items(), ("fake", score.fake), ("real", score.real)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise UserError(f"clip {score.clip}: {name} is not finite; look at its videos")
        self.scores[score.clip] = score

    def _check_new(self, clip: int) -> None:
        if clip in self.scores:
            raise UserError(f"clip {clip} was scored already; every clip counts once")
        if not 0 <= clip < self.protocol.clips:
            raise UserError(f"clip {clip}: the protocol has clips 0 to {self.protocol.clips - 1}")

    def _check_video(self, video: Tensor, frames: int, label: str) -> None:
        check_videos(video.unsqueeze(0), label)
        shape = (frames, 3, self.protocol.resolution, self.protocol.resolution)
        if video.shape != shape:
            hint = (
                "; leave the context out"
                if video.shape[0] == self.protocol.frames != frames
                else ""
            )
            raise UserError(
                f"{label} has shape {tuple(video.shape)}, the protocol's is {shape}{hint}"
            )

    def _measure(self, reference: Tensor, sample: Tensor, *, first: bool) -> dict[str, Tensor]:
        """Figures (F,) of one trajectory, its features ``fake`` (D,), and the reference's ``real``
        (D,) for the first trajectory, or for each when the codec is used."""
        reference = reference.float()
        context = reference[: self.protocol.context]
        video = torch.cat([context, sample.to(reference)])
        if self.far_compat:
            video, reference = through_h264(video, reference)
        generated, truth = video[None, len(context) :], reference[None, len(context) :]
        figures = {
            "mse": mse_frames(generated, truth)[0].cpu(),
            "ssim": ssim_frames(generated, truth, self.ssim)[0],
        }
        figures["psnr"] = (-10 * torch.log10(figures["mse"])).clamp_max(CEILING)
        if self.networks.lpips is not None:
            figures["lpips"] = self.networks.lpips(generated, truth, unscaled=self.far_compat)[0]
        if self.networks.features is not None:
            fvd_frames = slice(None) if self.protocol.fvd_context else slice(len(context), None)
            figures["fake"] = _features(self.networks.features, video[fvd_frames])
            if first or self.far_compat:
                # with the codec the reference depends on the sample beside it: nothing to store
                real_extractor = None if self.far_compat else self.networks.real
                figures["real"] = _features(
                    real_extractor or self.networks.features, reference[fvd_frames]
                )
        return figures

    def save(self, score: ClipScore, folder: Path) -> None:
        """Write a clip's score (kilobytes) to ``folder``, whole or not at all, for
        :meth:`resume`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"frames.{name}": value for name, value in score.frames.items()}
        tensors |= {
            name: value
            for name, value in (("fake", score.fake), ("real", score.real))
            if value is not None
        }
        header = {
            "clip": score.clip,
            "key": self.key,
            "seconds": [score.generation_seconds, score.metric_seconds],
        }
        write_tensors(
            folder / f"clip-{score.clip:05d}.safetensors", tensors, {"score": json.dumps(header)}
        )

    def resume(self, folder: Path) -> set[int]:
        """Add every score in ``folder`` and return the numbers of all scored clips. A missing
        folder counts as empty.

        Raises UserError for a damaged file, or one of another protocol, other weights or another
        ``far_compat``.
        """
        for path in sorted(folder.glob("clip-*.safetensors")):
            with (
                foreign(path, "not a clip's score; delete it"),
                safe_open(path, framework="pt") as file,
            ):
                header = typed(json.loads(file.metadata()["score"]), SavedScore, path, "delete it")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.key != self.key:
                raise UserError(
                    f"{path}: scored under another protocol, weights or codec; use another folder"
                )
            if header.clip in self.scores:
                continue
            fake, real = tensors.pop("fake", None), tensors.pop("real", None)
            frames = {name.removeprefix("frames."): value for name, value in tensors.items()}
            self.add_score(ClipScore(header.clip, frames, fake, real, *header.seconds))
        return set(self.scores)

    def result(self) -> PredictionResult:
        """Figures of the clips scored so far. UserError: no clip, or a single one where FVD is
        measured."""
        scores = [self.scores[clip] for clip in sorted(self.scores)]
        if not scores or (self.networks.features is not None and len(scores) < 2):
            raise UserError(f"protocol {self.protocol.name}: {len(scores)} clips scored; add more")
        figures: dict[str, PredictionFigure] = {}
        curves: dict[str, tuple[float, ...]] = {}
        warnings: tuple[str, ...] = ()
        for name in (name for name in MEASURES if name in scores[0].frames):
            values = torch.stack([score.frames[name] for score in scores])
            figures[name], curves[name] = frame_figure(self.protocol, name, values)
        if scores[0].fake is not None:
            fake = torch.stack([torch.as_tensor(score.fake) for score in scores])
            real = torch.stack([torch.as_tensor(score.real) for score in scores])
            figures["fvd"] = video_figure(fake, real)
            warnings = self._fvd_warnings(len(scores), fake.shape[-1])
        psnr = torch.stack([score.frames["psnr"] for score in scores])
        return PredictionResult(
            protocol=self.protocol,
            clips=len(scores),
            far_compat=self.far_compat,
            warnings=warnings,
            weights=dict(self.networks.weights),
            figures=figures,
            curves=curves,
            equal_frames=int((psnr >= CEILING).sum()),
            generation_seconds=sum(score.generation_seconds for score in scores),
            metric_seconds=sum(score.metric_seconds for score in scores),
        )

    def _fvd_warnings(self, clips: int, dimensions: int) -> tuple[str, ...]:
        """Why the FVD of ``clips`` clips is not comparable, a sentence each."""
        warnings = []
        if clips < dimensions:
            warnings.append(
                f"FVD of {clips} clips in {dimensions} dimensions: the covariances are singular; it falls as clips are "
                f"added and compares with FVD of {clips} clips only"
            )
        if self.far_compat and self.networks.weights.get(TORCHSCRIPT) != TORCHSCRIPT_SHA256:
            warnings.append(
                "FVD does not compare with FAR's and SCD's: theirs is of StyleGAN-V's i3d_torchscript.pt, "
                "this of another I3D (give i3d_torchscript=FILE)"
            )
        return tuple(warnings)


def frame_figure(
    protocol: PredictionProtocol, name: str, values: Tensor
) -> tuple[PredictionFigure, tuple[float, ...]]:
    """The figure and the drift curve (F,) of one measure, ``values`` (N, T, F).

    Best: for each clip the trajectory with the highest (PSNR, SSIM) or lowest (LPIPS, MSE) mean
    over frames. (The public code takes the highest MSE, the worst.) Spread: over seeds for the mean
    of several, else over resamples.
    """
    per_trajectory = values.mean(dim=2)
    seeds = values.shape[1]
    if protocol.reduce == "best":
        best_trajectory = (
            per_trajectory.argmax(1) if MEASURES[name][1] else per_trajectory.argmin(1)
        )
        per_clip = values[torch.arange(len(values)), best_trajectory]
    else:
        per_clip = values.mean(dim=1)
    figure = float(per_clip.mean())
    if protocol.reduce == "mean" and seeds > 1:
        std, spread_over = spread(per_trajectory.mean(0).tolist()).std, f"{seeds} seeds"
    else:
        std, spread_over = _resampled(lambda index: float(per_clip[index].mean()), len(values))
    return PredictionFigure(figure, std, spread_over), tuple(per_clip.mean(0).tolist())


def video_figure(fake: Tensor, real: Tensor) -> PredictionFigure:
    """FVD from features (N, T, D) and (N, T or 1, D): per trajectory over all clips, then the mean
    over trajectories.

    Spread: over trajectories, or for a single one over resampled clips (the reference stays).
    """
    pairs = [(fake[:, i], real[:, min(i, real.shape[1] - 1)]) for i in range(fake.shape[1])]
    distances = spread([frechet_distance(trajectory, reference) for trajectory, reference in pairs])
    if distances.count > 1:
        return PredictionFigure(distances.mean, distances.std, f"{distances.count} trajectories")
    trajectory, reference = pairs[0]
    std, spread_over = _resampled(
        lambda index: frechet_distance(trajectory[index], reference), len(trajectory)
    )
    return PredictionFigure(distances.mean, std, spread_over)


def _resampled(statistic: Callable[[Tensor], float], clips: int) -> tuple[float, str]:
    """The standard deviation of ``statistic`` over resampled clips, and a description of the
    resamples."""
    std = bootstrap(statistic, clips, resamples=RESAMPLES).std
    return std, f"{RESAMPLES} resamples of {clips} clips"


def _features(extractor: FeatureExtractor, video: Tensor) -> Tensor:
    """(F, 3, H, W) -> (D,); UserError for an extractor that does not give one row for a video."""
    groups = extractor(video.unsqueeze(0))
    if len(groups) != 1 or groups[0].shape[:2] != (1, 1):
        raise UserError("FVD: the extractor must give one group of one row per video, as I3D does")
    return groups[0][0, 0]


def through_h264(sample: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both (F, 3, H, W), side by side in one H.264 file, written and read again, as FAR does.

    Values are cut, not rounded, to 8 bits; 4:2:0 chroma; crf 25. On the CPU. Raises UserError for
    an odd height.
    """
    pair = (torch.cat([sample, reference], dim=3).clamp(0, 1) * 255).to(torch.uint8).cpu()
    with tempfile.TemporaryDirectory(prefix="scd-sf-h264-") as folder:
        path = Path(folder) / "pair.mp4"
        write_video(path, pair, FAR_FPS, crf=FAR_CRF)
        decoded_pair = read_video(path).float() / 255
    width = sample.shape[3]
    return decoded_pair[..., :width], decoded_pair[..., width:]
