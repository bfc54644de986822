"""Protocols, the scorer and its results, with networks of random weights or none; real ones:
test_real_weights.py."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from scd_sf.evaluation.frames import ssim_frames
from scd_sf.evaluation.fvd import frechet_distance
from scd_sf.evaluation.i3d import TORCHSCRIPT_SHA256
from scd_sf.evaluation.prediction_metrics import (
    MetricNetworks,
    PredictionScorer,
    frame_figure,
    through_h264,
    video_figure,
)
from scd_sf.evaluation.prediction_protocols import (
    PROTOCOLS,
    PredictionProtocol,
    Reduction,
    named_protocol,
)
from scd_sf.evaluation.prediction_result import PredictionFigure, PredictionResult, prediction_table
from scd_sf.types import UserError

SIDE = 16


class Means:
    """A clip network in miniature: the mean colour of every frame, one row per video."""

    components: tuple[int | None, ...] = (None,)

    def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
        return (videos.double().mean(dim=(3, 4)).flatten(1).unsqueeze(1),)


NETWORKS = MetricNetworks(features=Means(), weights={"means": "0" * 64})


def small(
    seeds: tuple[int, ...] = (0, 1, 2), reduce: Reduction = "best", clips: int = 4
) -> PredictionProtocol:
    return PredictionProtocol.custom(
        context=2, generated=3, clips=clips, resolution=SIDE, seeds=seeds, reduce=reduce
    )


def reference(clip: int) -> Tensor:
    return 0.2 + 0.6 * torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(clip))


def noisy(clip: int, level: float) -> Tensor:
    noise = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(100 + clip))
    return (reference(clip)[2:] + level * noise).clamp(0, 1)


def scored(
    protocol: PredictionProtocol, levels: tuple[float, ...], **options: bool
) -> PredictionScorer:
    scorer = PredictionScorer(protocol, NETWORKS, **options)
    for clip in range(protocol.clips):
        scorer.add(clip, reference(clip), [noisy(clip, level) for level in levels])
    return scorer


def test_the_named_protocols_are_the_published_ones() -> None:
    facts = {
        name: (p.version, p.context, p.generated, p.clips, p.resolution, p.seeds, p.reduce)
        for name, p in PROTOCOLS.items()
    }
    assert facts == {
        "minecraft-fvd": ("2", 36, 264, 256, 128, (0,), "mean"),
        "minecraft-frames": ("2", 144, 156, 256, 128, (0,), "mean"),
        "minecraft-scd": ("2", 144, 156, 256, 128, (0, 1, 2, 3), "best"),
        "far-minecraft": ("2", 144, 156, 256, 128, (0, 2, 4, 6), "mean"),
        "far-minecraft-fvd": ("2", 36, 264, 256, 128, (0, 2, 4, 6), "mean"),
        "ucf101": ("2", 4, 12, 256, 64, tuple(range(100)), "best"),
        "realestate10k": ("2", 16, 48, 256, 256, (0,), "mean"),
    }
    assert all(p.ssim == "valid" for p in PROTOCOLS.values())
    assert replace(small((0,)), ssim="padded").title.endswith(
        "1 trajectory, SSIM with padded borders"
    )
    assert all(p.fvd_context and p.first_frame == 0 and p.selection for p in PROTOCOLS.values())
    assert (
        named_protocol("ucf101").title
        == "ucf101 v2: 4 -> 12 frames of 64 px, 256 clips, best of 100"
    )
    assert small((0,)).title.startswith("custom, not comparable v2: 2 -> 3")
    with pytest.raises(UserError, match="use one of minecraft-fvd"):
        named_protocol("kinetics")
    for wrong, message in (
        ({"generated": 0}, "generated is 0"),
        ({"seeds": (1, 1)}, "a seed is there twice"),
        ({"seeds": ()}, "seeds is 0"),
        ({"reduce": "worst"}, "use 'best' or 'mean'"),
        ({"ssim": "same"}, "use one of valid, padded"),
    ):
        with pytest.raises(UserError, match=message):
            replace(small(), **wrong)


def test_best_takes_the_best_of_each_figure_and_never_the_worst() -> None:
    """B9: the public code keeps the largest MSE of the trajectories."""
    values = torch.tensor(
        [[[3.0, 1.0], [1.0, 1.2], [9.0, 9.0]], [[5.0, 5.0], [6.0, 8.0], [0.0, 2.0]]]
    )
    best, mean = small(clips=2), small(clips=2, reduce="mean")
    for name in ("mse", "lpips"):
        figure, curve = frame_figure(best, name, values)
        assert (figure.value, *curve) == pytest.approx(((1.1 + 1.0) / 2, 0.5, 1.6))
    for name in ("psnr", "ssim"):
        figure, curve = frame_figure(best, name, values)
        assert (figure.value, *curve) == pytest.approx(((9 + 7) / 2, 7.5, 8.5))
    assert figure.spread_over == "20 resamples of 2 clips"
    figure, curve = frame_figure(mean, "mse", values)
    assert figure.value == pytest.approx(float(values.mean())) == pytest.approx(sum(curve) / 2)
    per_seed = values.mean(dim=(0, 2))
    assert figure.std == pytest.approx(float(per_seed.std())) and figure.spread_over == "3 seeds"


def test_fvd_is_taken_per_trajectory_then_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(6, 3, 5, generator=generator).double() for _ in range(2))
    each = [frechet_distance(fake[:, i], real[:, 0]) for i in range(3)]
    figure = video_figure(fake, real[:, :1])
    assert figure.value == pytest.approx(sum(each) / 3) and figure.spread_over == "3 trajectories"
    assert figure.value != pytest.approx(frechet_distance(fake.flatten(0, 1), real[:, 0]), rel=0.05)
    own = [frechet_distance(fake[:, i], real[:, i]) for i in range(3)]
    assert video_figure(fake, real).value == pytest.approx(sum(own) / 3)
    single = video_figure(fake[:, :1], real[:, :1])
    assert (
        single.value == pytest.approx(each[0])
        and single.std > 0
        and "resamples of 6 clips" in single.spread_over
    )


def test_scores_of_known_noise() -> None:
    """Noise of standard deviation s has PSNR -20 log10 s; the least noisy trajectory is the best by
    every figure."""
    result = scored(small(), (0.2, 0.05, 0.1)).result()
    assert result.figures.keys() == {"psnr", "ssim", "mse", "fvd"} == result.curves.keys() | {"fvd"}
    assert result.figures["psnr"].value == pytest.approx(-20 * math.log10(0.05), abs=0.3)
    assert result.figures["mse"].value == pytest.approx(0.05**2, rel=0.05)
    for name, curve in result.curves.items():
        assert len(curve) == 3 and sum(curve) / 3 == pytest.approx(result.figures[name].value)
    average = scored(small(reduce="mean"), (0.2, 0.05, 0.1)).result()
    assert average.figures["psnr"].value < result.figures["psnr"].value - 3
    assert average.figures["fvd"] == result.figures["fvd"], "FVD knows no best trajectory"
    assert result.clips == 4 and not result.equal_frames and result.weights == {"means": "0" * 64}

    fakes = [torch.cat([reference(clip)[:2], noisy(clip, 0.05)]) for clip in range(4)]
    rows = (
        Means()(torch.stack(fakes))[0][:, 0],
        Means()(torch.stack([reference(clip) for clip in range(4)]))[0][:, 0],
    )
    assert video_figure(rows[0][:, None], rows[1][:, None]).value == pytest.approx(
        scored(small((0,)), (0.05,)).result().figures["fvd"].value
    )
    equal = scored(small((0,)), (0.0,)).result()
    assert equal.figures["psnr"].value == 100 and equal.equal_frames == 12
    assert equal.figures["fvd"].value == pytest.approx(0, abs=1e-6)
    equal.to_json()


def test_context_in_fvd_or_not() -> None:
    with_context, without = small((0,)), replace(small((0,)), fvd_context=False)
    seen = [scored(protocol, (0.1,)).scores[0] for protocol in (with_context, without)]
    assert [tuple(score.fake.shape) for score in seen if score.fake is not None] == [
        (1, 15),
        (1, 9),
    ]
    assert seen[0].fake is not None and seen[0].real is not None
    assert torch.equal(seen[0].fake[0, :6], seen[0].real[0, :6]), "context is true on both sides"


def test_a_generator_of_samples_is_timed_and_counted() -> None:
    def slow(levels: tuple[float, ...]) -> Iterator[Tensor]:
        for level in levels:
            torch.zeros(1)
            yield noisy(0, level)

    scorer = PredictionScorer(small(clips=2), NETWORKS)
    score = scorer.add(0, reference(0), slow((0.1, 0.2, 0.3)))
    assert (
        score.frames["psnr"].shape == (3, 3)
        and score.generation_seconds > 0
        and score.metric_seconds > 0
    )
    for levels, message in (
        ((0.1, 0.2), "2 samples; the protocol has 3 seeds"),
        ((0.1,) * 4, "more than 3 samples"),
    ):
        with pytest.raises(UserError, match=message):
            scorer.add(1, reference(1), slow(levels))
    with pytest.raises(UserError, match="1 clips scored; add more"):
        scorer.result()
    scorer.add(1, reference(1), slow((0.1, 0.2, 0.3)))
    result = scorer.result()
    assert result.seconds_per_frame == pytest.approx(result.generation_seconds / 18)


def test_features_of_true_clips_are_kept(tmp_path: Path) -> None:
    """Computed once for two models, by content; never those of samples; a damaged file is made
    anew; equal figures."""
    seen: list[Tensor] = []

    class Counting(Means):
        def __call__(self, videos: Tensor) -> tuple[Tensor, ...]:
            seen.append(videos)
            return super().__call__(videos)

    protocol, plain = small(seeds=(0,), reduce="mean", clips=3), NETWORKS
    counting = MetricNetworks(features=Counting(), weights=plain.weights).keeping(tmp_path)
    results = []
    for networks in (plain, counting, counting):
        scorer = PredictionScorer(protocol, networks)
        for clip in range(3):
            scorer.add(clip, reference(clip), [noisy(clip, 0.1)])
        results.append(scorer.result().figures["fvd"].value)
    assert len(seen) == 2 * 3 + 3 and len(list(tmp_path.iterdir())) == 3
    assert results[0] == results[1] == results[2]
    next(tmp_path.iterdir()).write_bytes(b"damaged")
    PredictionScorer(protocol, counting).add(0, reference(0), [noisy(0, 0.1)])
    PredictionScorer(protocol, counting).add(1, reference(1), [noisy(1, 0.1)])
    PredictionScorer(protocol, counting).add(2, reference(2), [noisy(2, 0.1)])
    assert len(seen) == 9 + 3 + 1
    other = MetricNetworks(features=Counting(), weights={"means": "1" * 64}).keeping(tmp_path)
    PredictionScorer(protocol, other).add(0, reference(0), [noisy(0, 0.1)])
    assert len(seen) == 13 + 2


def test_what_add_refuses() -> None:
    scorer = PredictionScorer(small((0,)), NETWORKS)
    good = noisy(0, 0.1)
    whole = torch.cat([reference(0)[:2], good])
    nan = good.clone()
    nan[1, 0, 3, 3] = math.nan
    for clip, truth, sample, message in (
        (0, reference(0)[1:], good, r"clip 0: the reference has shape \(4, 3, 16, 16\)"),
        (
            0,
            reference(0),
            whole,
            r"clip 0, trajectory 0: the sample has shape \(5, .*leave the context out",
        ),
        (0, reference(0), good[..., :8], r"the protocol's is \(3, 3, 16, 16\)"),
        (0, reference(0), nan, "clip 0, trajectory 0: the sample: values lie in"),
        (0, reference(0) * 2 - 1, good, "the reference: values lie in"),
        (4, reference(0), good, "the protocol has clips 0 to 3"),
    ):
        with pytest.raises(UserError, match=message):
            scorer.add(clip, truth, [sample])
    score = scorer.add(0, reference(0), [good])
    with pytest.raises(UserError, match="clip 0 was scored already"):
        scorer.add(0, reference(0), [good])
    with pytest.raises(UserError, match="clip 2: psnr is not finite"):
        scorer.add_score(
            replace(score, clip=2, frames={**score.frames, "psnr": torch.tensor([[math.nan]])})
        )
    with pytest.raises(UserError, match="FVD needs 2 clips"):
        PredictionScorer(small(clips=1), NETWORKS)
    alone = PredictionScorer(small((0,), clips=1), MetricNetworks())
    alone.add(0, reference(0), [good])
    assert alone.result().figures.keys() == {"psnr", "ssim", "mse"}


def test_scores_are_kept_and_a_run_resumes(tmp_path: Path) -> None:
    protocol, levels = small(), (0.2, 0.05, 0.1)
    whole = scored(protocol, levels)
    first = PredictionScorer(protocol, NETWORKS)
    assert first.resume(tmp_path / "none") == set()
    for clip in (2, 0):
        first.save(
            first.add(clip, reference(clip), [noisy(clip, level) for level in levels]), tmp_path
        )
    again = PredictionScorer(protocol, NETWORKS)
    assert again.resume(tmp_path) == {0, 2} == again.resume(tmp_path)
    assert "only 2 of 4 clips: not comparable" in again.result().title
    for clip in (1, 3):
        again.add(clip, reference(clip), [noisy(clip, level) for level in levels])
    timeless = [
        replace(scorer.result(), generation_seconds=0.0, metric_seconds=0.0).to_json()
        for scorer in (whole, again)
    ]
    assert timeless[0] == timeless[1]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000
    for other in (
        PredictionScorer(replace(protocol, version="1"), NETWORKS),
        PredictionScorer(protocol, replace(NETWORKS, weights={})),
        PredictionScorer(protocol, NETWORKS, far_compat=True),
    ):
        with pytest.raises(UserError, match="another protocol, weights or codec"):
            other.resume(tmp_path)
    (tmp_path / "clip-00001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(
        UserError, match=r"clip-00001\.safetensors: .*not a clip's score; delete it"
    ):
        PredictionScorer(protocol, NETWORKS).resume(tmp_path)


def test_far_s_way_goes_through_a_codec_on_both_sides_and_says_so() -> None:
    smooth = torch.linspace(0, 1, 32).expand(4, 3, 32, 32)
    one, other = through_h264(smooth, 1 - smooth)
    assert one.shape == other.shape == smooth.shape
    assert (
        0 < float((one - smooth).abs().mean()) < 0.03
        and float((other - (1 - smooth)).abs().mean()) < 0.03
    )
    plain, compatible = (scored(small((0,)), (0.1,), far_compat=far) for far in (False, True))
    assert compatible.result().figures["psnr"] != plain.result().figures["psnr"]
    assert "FAR-compatible" in compatible.result().title and "FAR" not in plain.result().title
    one, other = compatible.scores[0].frames["ssim"], plain.scores[0].frames["ssim"]
    assert plain.ssim == "valid" and compatible.ssim == "padded" and not torch.allclose(one, other)
    padded = scored(replace(small((0,)), ssim="padded"), (0.1,))
    whole, truth = noisy(0, 0.1)[None], reference(0)[None, 2:]
    assert torch.equal(padded.scores[0].frames["ssim"], ssim_frames(whole, truth, "padded"))
    assert torch.equal(other, ssim_frames(whole, truth)) and padded.key != plain.key
    several = scored(small(), (0.1, 0.2, 0.3), far_compat=True)
    assert several.scores[0].real is not None and several.scores[0].real.shape[0] == 3, (
        "each with its own decoding"
    )


def test_an_fvd_that_does_not_compare_says_so() -> None:
    """In the JSON and under the table: too few clips for the features, and FAR's way without FAR's
    network."""
    few = "FVD of 4 clips in 15 dimensions: the covariances are singular"
    other = "FVD does not compare with FAR's and SCD's"
    plain = scored(small((0,)), (0.1,)).result()
    assert len(plain.warnings) == 1 and plain.warnings[0].startswith(few)
    assert json.loads(plain.to_json())["warnings"] == list(plain.warnings)
    compatible = scored(small((0,)), (0.1,), far_compat=True).result()
    assert [text[: len(other)] for text in compatible.warnings[1:]] == [other]
    console = Console(width=400, file=io.StringIO())
    with console.capture() as printed:
        console.print(prediction_table({"ours": compatible}))
    assert f"Note: {few}" in printed.get() and f"Note: {other}" in printed.get()

    def warnings_of(weights: dict[str, str], *, far: bool, clips: int = 4) -> tuple[str, ...]:
        networks, protocol = (
            MetricNetworks(features=Means(), weights=weights),
            small((0,), clips=clips),
        )
        scorer = PredictionScorer(protocol, networks, far_compat=far)
        for clip in range(clips):
            scorer.add(clip, reference(clip), [noisy(clip, 0.1)])
        return scorer.result().warnings

    known = {"i3d_torchscript": TORCHSCRIPT_SHA256}
    assert len(warnings_of(known, far=True)) == 1, "FAR's own network compares"
    assert len(warnings_of({"i3d_torchscript": "0" * 64}, far=True)) == 2
    assert warnings_of(known, far=False, clips=15) == ()
    alone = PredictionScorer(small((0,), clips=1), MetricNetworks(), far_compat=True)
    alone.add(0, reference(0), [noisy(0, 0.1)])
    assert alone.result().warnings == (), "no FVD, nothing to warn of"


def test_results_as_json(tmp_path: Path) -> None:
    result = scored(small(), (0.2, 0.05, 0.1)).result()
    result.write(tmp_path / "result.json")
    assert PredictionResult.read(tmp_path / "result.json") == result
    row = json.loads(result.to_json())
    assert row["protocol"]["name"] == "custom, not comparable" and row["protocol"]["seeds"] == [
        0,
        1,
        2,
    ]
    for value in (math.nan, math.inf):
        broken = replace(result, figures={"fvd": PredictionFigure(value, 0.0, "3 trajectories")})
        with pytest.raises(UserError, match="NaN or infinite"):
            broken.to_json()
    for change, message in (
        ({"schema": 1}, "'schema' differs"),
        ({"extra": 1}, "extra"),
        ({"clips": "4"}, r"Expected `int`, got `str` - at `\$\.clips`"),
        ({"figures": {"fvd": 3}}, r"at `\$\.figures"),
        ({"protocol": {**row["protocol"], "seeds": None}}, r"at `\$\.protocol\.seeds`"),
        ({"protocol": {**row["protocol"], "generated": 0}}, "generated is 0"),
    ):
        with pytest.raises(UserError, match=message):
            PredictionResult.from_json(json.dumps({**row, **change}))
    with pytest.raises(UserError, match="NaN is not a JSON number"):
        PredictionResult.from_json(
            result.to_json().replace('"equal_frames": 0', '"equal_frames": NaN')
        )
    with pytest.raises(UserError, match="cannot be read"):
        PredictionResult.read(tmp_path / "none.json")


def test_a_table_holds_one_protocol_only() -> None:
    best, mean = (
        scored(small(reduce=reduce), (0.2, 0.05, 0.1)).result() for reduce in ("best", "mean")
    )
    console = Console(width=200, file=io.StringIO())
    with console.capture() as printed:
        console.print(prediction_table({"ours": best, "theirs": best, "[/x]": best}))
    text = printed.get()
    assert (
        "custom, not comparable v2" in text
        and "ours" in text
        and "psnr" in text
        and "lower is better" in text
    )
    for other in (
        mean,
        replace(best, clips=3),
        replace(best, weights={"i3d": "1"}),
        replace(best, far_compat=True),
    ):
        with pytest.raises(UserError, match="do not share a table"):
            prediction_table({"ours": best, "theirs": other})
    assert asdict(best)["curves"].keys() == {"psnr", "ssim", "mse"}
