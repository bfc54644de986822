"""Frechet distance between sets of videos, and the fixed feature network of the demo.

A feature extractor is an argument of :class:`VideoFrechet`. It returns row-aligned feature
*groups*, each (V, R, D_g), with R rows per video (frame pairs for :class:`TextureMotion`, one row
per video for a clip network such as I3D). Each group is used as it is, or is standardised and
projected on its principal components *of the reference videos only*; then the groups are joined to
rows of one Gaussian. All rows of a table share one fitted basis, and only their distances can be
compared with each other. A distance from another basis, world or extractor is another unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from scd_sf.evaluation.frames import RGB, Spread, bootstrap, check_videos
from scd_sf.files import write_tensors
from scd_sf.types import UserError

LUMA = (0.299, 0.587, 0.114)
MIN_ROWS = 2


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets of rows (N, D), covariances
    with n-1.

    With X the centred rows over sqrt(n-1), S = X^T X, the eigenvalues of S_a S_b are the squared
    singular values of X_a X_b^T: their sum is the trace, in fp64. No square root of a rounding
    error occurs, so the result is real and exact to the last digits, also for a singular covariance
    (fewer rows than dimensions).
    """
    for name, rows in (("first", features_a), ("second", features_b)):
        if rows.ndim != MIN_ROWS or rows.shape[0] < MIN_ROWS:
            raise UserError(
                f"Frechet distance: the {name} set has shape {tuple(rows.shape)}; give (rows >= 2, dims)"
            )
    if features_a.shape[1] != features_b.shape[1]:
        raise UserError(
            f"Frechet distance: {features_a.shape[1]} and {features_b.shape[1]} dimensions; use one basis"
        )
    a, b = features_a.double(), features_b.double()
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise UserError("Frechet distance: a feature is not finite; look for NaN in the videos")
    shift = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = _root(a), _root(b)
    trace_root = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(shift + root_a.square().sum() + root_b.square().sum() - 2 * trace_root))


def _root(rows: Tensor) -> Tensor:
    """X (at most D rows) with X^T X = the covariance of ``rows`` (N, D)."""
    centred = (rows - rows.mean(0)) / math.sqrt(rows.shape[0] - 1)
    if rows.shape[0] <= rows.shape[1]:
        return centred
    upper: Tensor = torch.linalg.qr(centred, mode="r").R
    return upper


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / (rows.shape[0] - 1)


class FeatureExtractor(Protocol):
    """Videos to feature rows. Fixed: the same videos give the same rows in every run."""

    @property
    def components(self) -> tuple[int | None, ...]:
        """Per group: how many principal components of the reference are kept; None = the group is
        used as it is."""
        ...

    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        """Float videos (V, F, 3, H, W) in [0, 1] -> groups (V, R, D_g) fp64 with equal V and R."""
        ...


class FeatureCache:
    """An extractor that stores its features in ``folder`` and reads them from there the next time,
    so that true clips are computed once for many models. The key is the videos' bytes and
    ``weights``, the hash of the extractor's weights. Damaged files are written again."""

    def __init__(self, extractor: FeatureExtractor, folder: Path, weights: str) -> None:
        self.extractor = extractor
        self.folder = folder
        self.weights = weights

    @property
    def components(self) -> tuple[int | None, ...]:
        return self.extractor.components

    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        x = videos.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{self.weights} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.numpy().data)
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        try:
            stored = load_file(path)
            return tuple(stored[str(number)] for number in range(len(stored)))
        except (FileNotFoundError, SafetensorError, KeyError):
            groups = self.extractor(videos)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(
            path, {str(number): group.contiguous() for number, group in enumerate(groups)}
        )
        return groups


def fixed_uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers uniform in [-1, 1), bit-equal on every machine: the 53 high bits of PCG64(seed)'s raw
    64-bit output."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    unit = (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((2.0 * unit - 1.0).reshape(shape))


class TextureMotion:
    """The demo's fixed network: 8 components of the frame and 16 of the frame difference, 24
    numbers per frame pair.

    One frame (3, H, W), x in [0, 1], gives 256 numbers f(x):

    - 48 colour: mean R, G, B of a 4x4 grid;
    - 16 local contrast: mean |Y - box5(Y)| of a 4x4 grid, Y = BT.601 luma, box5 = 5x5 mean, edges
      replicated;
    - 64 random filters: 16 filters 5x5, stride 2, on (x - 0.5) / 0.25; each filter has mean zero in
      every colour, so it sees texture and not brightness; absolute value; mean over a 2x2 grid;
    - 128 random filters: 32 filters 3x3, stride 2, on the 16 maps above; ReLU; mean over a 2x2
      grid.

    Weights are ``fixed_uniform(seed) * sqrt(6 / fan_in)``, seeds 20240601 and 20240602, no biases,
    no padding (frames of at least 16x16). A row is made of the pair (t, t + gap): group one is
    f(x_{t+gap}), group two is f(x_{t+gap}) - f(x_t). Grids are ``adaptive_avg_pool2d``. It reacts
    to blur, noise, wrong colours, frozen and jittering motion, not to the content of a scene. It
    was designed by hand and is no substitute for I3D.
    """

    def __init__(self, gap: int = 1, batch: int = 256) -> None:
        """``gap``: pixel frames between the two frames of a pair; ``batch``: frames per forward
        pass."""
        if gap < 1:
            raise UserError(f"TextureMotion: gap is {gap}; it must be at least 1")
        self.gap = gap
        self.batch = batch
        first = fixed_uniform(20240601, (16, RGB, 5, 5))
        first = first - first.mean(dim=(2, 3), keepdim=True)
        self.first = (first * math.sqrt(6 / (RGB * 25))).float()
        self.second = (fixed_uniform(20240602, (32, 16, 3, 3)) * math.sqrt(6 / (16 * 9))).float()
        self.luma = torch.tensor(LUMA).view(1, RGB, 1, 1)

    @property
    def components(self) -> tuple[int | None, ...]:
        return (8, 16)

    def frame_features(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 256) fp64."""
        rows = []
        for chunk in torch.split(frames.detach().float(), self.batch):
            luma = (chunk * self.luma.to(chunk.device)).sum(1, keepdim=True)
            padded = functional.pad(luma, (2, 2, 2, 2), mode="replicate")
            contrast = (luma - functional.avg_pool2d(padded, 5, stride=1)).abs()
            maps = functional.conv2d(
                (chunk - 0.5) / 0.25, self.first.to(chunk.device), stride=2
            ).abs()
            deep = functional.conv2d(maps, self.second.to(chunk.device), stride=2).relu()
            pooled = [(chunk, 4), (contrast, 4), (maps, 2), (deep, 2)]
            rows.append(
                torch.cat(
                    [functional.adaptive_avg_pool2d(x, size).flatten(1) for x, size in pooled], 1
                )
            )
        return torch.cat(rows).double()

    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        count, frames = videos.shape[:2]
        if frames <= self.gap:
            raise UserError(
                f"TextureMotion: videos have {frames} frames; pairs {self.gap} apart need more"
            )
        features = self.frame_features(videos.flatten(0, 1)).view(count, frames, -1)
        later, earlier = features[:, self.gap :], features[:, : -self.gap]
        return later, later - earlier


@dataclass(frozen=True)
class Projection:
    """Standardisation and principal axes of one feature group, fitted on the reference."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    axes: Tensor  # (D, components)

    @classmethod
    def fit(cls, rows: Tensor, components: int) -> Projection:
        """rows (N, D) fp64. Features that do not vary on the reference get scale 1, so that they
        cannot explode."""
        mean, std = rows.mean(0), rows.std(0)
        scale = torch.where(std > 1e-6, std, torch.ones_like(std))
        component_limit = min(rows.shape[0] - 1, rows.shape[1])
        if components > component_limit:
            raise UserError(
                f"Frechet reference: {components} components of {component_limit} available; give more videos"
            )
        _, vectors = torch.linalg.eigh(_covariance((rows - mean) / scale))
        return cls(mean, scale, vectors.flip(1)[:, :components])

    def __call__(self, rows: Tensor) -> Tensor:
        """(..., D) -> (..., components)."""
        return ((rows - self.mean) / self.scale) @ self.axes


class VideoFrechet:
    """A fitted Frechet distance: the basis and the Gaussian come from the reference, every row of a
    table uses both."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        projections: tuple[Projection | None, ...],
        reference: Tensor,
    ) -> None:
        """Use :meth:`fit`. ``reference``: projected reference rows (V, R, D)."""
        self.extractor = extractor
        self.projections = projections
        self.reference = reference

    @classmethod
    def fit(cls, reference: Tensor, extractor: FeatureExtractor | None = None) -> VideoFrechet:
        """Fit on reference videos (V, F, 3, H, W) in [0, 1]; ``extractor`` None =
        ``TextureMotion()``."""
        check_videos(reference, "Frechet reference")
        network: FeatureExtractor = TextureMotion() if extractor is None else extractor
        groups = network(reference)
        projections = tuple(
            None if count is None else Projection.fit(group.flatten(0, 1), count)
            for group, count in zip(groups, network.components, strict=True)
        )
        return cls(network, projections, _join(groups, projections))

    def features(self, videos: Tensor) -> Tensor:
        """Projected rows (V, R, D) fp64."""
        check_videos(videos, "Frechet videos")
        return _join(self.extractor(videos), self.projections)

    def distance(self, videos: Tensor) -> float:
        """Frechet distance of ``videos`` (V, F, 3, H, W) to the reference."""
        return self.distance_of(self.features(videos))

    def distance_of(self, features: Tensor) -> float:
        """The same from rows (V, R, D) that :meth:`features` returned, so that they are computed
        once."""
        return frechet_distance(features.flatten(0, 1), self.reference.flatten(0, 1))

    def bootstrap(self, features: Tensor, *, resamples: int = 20, seed: int = 0) -> Spread:
        """Spread of the distance when the scored videos are drawn again with replacement (the
        reference stays)."""
        return bootstrap(
            lambda index: self.distance_of(features[index]),
            features.shape[0],
            resamples=resamples,
            seed=seed,
        )

    def distance_by_label(
        self, features: Tensor, labels: Sequence[str], reference_labels: Sequence[str]
    ) -> float:
        """Mean over labels of the distance between the videos and the reference videos of that
        label.

        The plain distance compares whole sets, so that real clips under wrong prompts score as well
        as under the right ones; here they score worse. Because groups are small, the value is
        higher than the plain distance, for every row alike. UserError: another number of labels
        than of videos, or a label without a reference video.
        """
        if len(labels) != features.shape[0] or len(reference_labels) != self.reference.shape[0]:
            raise UserError(
                f"Frechet by label: {len(labels)} and {len(reference_labels)} labels for {features.shape[0]} videos "
                f"and {self.reference.shape[0]} reference videos; give one label per video"
            )
        names = sorted(set(labels))
        missing_names = sorted(set(names) - set(reference_labels))
        if missing_names:
            raise UserError(
                f"Frechet by label: no reference video has label '{missing_names[0]}'; add some"
            )
        total = 0.0
        for name in names:
            rows = torch.tensor([label == name for label in labels])
            reference_rows = torch.tensor([label == name for label in reference_labels])
            total += frechet_distance(
                features[rows].flatten(0, 1), self.reference[reference_rows].flatten(0, 1)
            )
        return total / len(names)


def _join(groups: tuple[Tensor, ...], projections: tuple[Projection | None, ...]) -> Tensor:
    rows = [
        group.double() if projection is None else projection(group.double())
        for group, projection in zip(groups, projections, strict=True)
    ]
    return torch.cat(rows, dim=-1)
