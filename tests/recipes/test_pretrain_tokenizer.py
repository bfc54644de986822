"""The tokenizer's recipe at tiny size: trains, survives a kill bit for bit, writes what
load_tokenizer reads."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import recipe_runner
import tiny_run
import torch
from recipe_runner import At
from safetensors.torch import load_file

from scd_sf.data.clips import read_video, write_video
from scd_sf.data.sources.pixel_frames import to_unit
from scd_sf.evaluation.frames import reconstruction_figures
from scd_sf.models.tokenizers.tokenizer import load_tokenizer

SCRIPT = "recipes/pretrain_tokenizer.py"
SIZES = [
    "tokenizer.widths=[32,32,32]",
    "tokenizer.encoder_layers=[0,1,1]",
    "tokenizer.decoder_layers=[0,1,1]",
    "tokenizer.res_stages=3",
    "tokenizer.channels=8",
    "discriminator.width=8",
    "discriminator.layers=1",
    "train.steps=3",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.save_every=1",
    "train.validate_every=2",
    "engine.backend=torch",
    "engine.lr=1e-3",
    "gan_engine.backend=torch",
    "gan_engine.lr=1e-3",
    "run.log_every=1",
    "frames.keep_every=2",
    "frames.per_clip=2",
    "start_frames=24",
    "evaluation.frames=8",
    "evaluation.sheet=8",
]
# From the components, held to them, with a GAN from the third step; and the plain L1 of a fresh
# network in bf16.
VARIANTS = {
    "linear and gan": [
        "start=linear",
        "loss.anchor=0.1",
        "loss.noise=0.1",
        "gan.weight=0.5",
        "gan.start=2",
    ],
    "random": ["engine.dtype=bf16", "frames.keep_every=0"],
}


def write_clips(root: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        folder = root / split / "maze"
        folder.mkdir(parents=True)
        for number in range(count):
            coarse = torch.rand(8, 3, 4, 4, generator=rng)
            frames = (
                torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
                .mul(255)
                .to(torch.uint8)
            )
            write_video(folder / f"{number}.mp4", frames, 20, crf=1, chroma="yuv444p")
            np.savez(folder / f"{number}.npz", actions=np.zeros(8, dtype=np.int64))


def smooth_pixels() -> torch.Tensor:
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    write_clips(root)
    return root


def weights(run: Path) -> dict[str, bytes]:
    files = sorted((run / "checkpoints" / "step_00000003").rglob("*.safetensors"))
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in [*files, *run.glob("tokenizer/*.safetensors")]
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed(data: Path, tmp_path: Path, variant: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [f"data.root={data}", *SIZES, *VARIANTS[variant]]
    made = recipe_runner.succeed(SCRIPT, *arguments, f"run.dir={whole}")
    tiny_run.check_words(made.out, whole, "encode")
    # in the third step: of the decoder and of the discriminator
    backwards = 6 if variant == "linear and gan" else 5
    at = At(tiny_run.BACKWARD, backwards)
    assert recipe_runner.run(SCRIPT, *arguments, f"run.dir={killed}", at=at).code == -signal.SIGKILL
    assert not (killed / "tokenizer").exists()
    recipe_runner.succeed(SCRIPT, *arguments, f"run.dir={killed}")
    assert len(weights(whole)) >= 4 and weights(whole) == weights(killed)
    rows = tiny_run.metrics(whole)
    assert rows == tiny_run.metrics(killed) and len(rows) == 3
    names = [set(row) for row in rows]
    assert ("gan" in names[2]) == (variant == "linear and gan") and "gan" not in names[1]
    assert "val/psnr" in names[1] and "val/ssim" in names[2]
    written(whole, data, every=2 if variant == "linear and gan" else 1)


def written(run: Path, data: Path, every: int) -> None:
    """What it leaves: the averaged weights in fp16, latents of variance 1 per channel, figures of
    these very files."""
    tokenizer = load_tokenizer(run / "tokenizer")
    average = load_file(run / "checkpoints" / "step_00000003" / "ema.safetensors")
    stored = load_file(run / "tokenizer" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == average.keys() and all(
        torch.equal(stored[n], average[n].half()) for n in stored
    )
    train, test = (
        to_unit(torch.cat([read_video(file) for file in sorted((data / split).glob("*/*.mp4"))]))[
            None
        ]
        for split in ("train", "test")
    )
    latents = tokenizer.encode(train[:, ::every])[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(8), rtol=0, atol=2e-2)
    torch.testing.assert_close(latents.std(1), torch.ones(8), rtol=2e-2, atol=0)
    report = json.loads((run / "tokenizer" / "evaluation.json").read_text())
    chosen = test[:, [0, 2, 4, 6, 8, 10, 12, 14]]
    made = tokenizer.decode(tokenizer.encode(chosen))[0].clamp(-1, 1)
    figures = reconstruction_figures((made / 2 + 0.5).clamp(0, 1), chosen[0] / 2 + 0.5)
    assert {name: report[name] for name in figures} == pytest.approx(figures, abs=1e-3)
    assert report["sha256"] == tokenizer.sha256 and report["encode_ms_per_frame"] > 0
    origin = json.loads((run / "tokenizer" / "provenance.json").read_text())
    assert origin["stage"] == "tokenizer" and origin["step"] == 3 and SCRIPT in origin["command"]
    assert (run / "reconstructions.png").stat().st_size > 0


def test_going_on_from_a_tokenizer(data: Path, tmp_path: Path) -> None:
    """Without a step worth the name the pictures are those of the first training; fewer channels
    are its first ones; other sizes are refused."""
    arguments = [f"data.root={data}", *SIZES, "start=linear", "train.steps=1"]
    recipe_runner.succeed(SCRIPT, *arguments, f"run.dir={tmp_path / 'one'}")
    init = [
        f"init={tmp_path / 'one' / 'tokenizer'}",
        "engine.lr=1e-9",
        f"run.dir={tmp_path / 'two'}",
    ]
    recipe_runner.succeed(SCRIPT, *arguments, *init)
    one, two = (
        json.loads((tmp_path / name / "tokenizer" / "evaluation.json").read_text())
        for name in ("one", "two")
    )
    assert one["psnr"] == pytest.approx(two["psnr"], abs=0.01) and one["sha256"] != ""
    fewer = ["tokenizer.channels=5", "tokenizer.shortcuts=false", f"run.dir={tmp_path / 'fewer'}"]
    recipe_runner.succeed(SCRIPT, *arguments, *init, *fewer)
    pixels = smooth_pixels()
    whole, narrow = (load_tokenizer(tmp_path / name / "tokenizer") for name in ("two", "fewer"))
    inner = [whole.model.encode(pixels)[0][:, :5], narrow.model.encode(pixels)[0]]
    torch.testing.assert_close(*inner, atol=0.02, rtol=0.02)  # fp16 files
    other = recipe_runner.run(
        SCRIPT, *arguments, *init, "tokenizer.channels=16", f"run.dir={tmp_path / 'three'}"
    )
    assert other.code == 2 and "is not that of the config's tokenizer" in other.err


def test_one_statistic_for_all_channels(data: Path, tmp_path: Path) -> None:
    more = ["train.steps=1", "evaluation.statistics=one"]
    recipe_runner.succeed(SCRIPT, f"data.root={data}", *SIZES, *more, f"run.dir={tmp_path / 'run'}")
    assert len(set(load_tokenizer(tmp_path / "run" / "tokenizer").normalisation.std)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss.perceptual=1.0"], "loss.perceptual and lpips_weights"),
        (["lpips_weights=x.pth"], "loss.perceptual and lpips_weights"),
        (["gan.weight=1", "engine.zero_stage=3"], "zero_stage 2 or less"),
        (["val.split=nowhere"], "nowhere"),
        (["train.global_batch=8"], "train.global_batch"),
        (["start=linear", "tokenizer.widths=[16,16,32]"], "start=linear"),
        (["tokenizer.widths=[32,32,32,32,32,32]"], "encoder_layers"),
        (["frames.per_clip=0"], "per_clip"),
    ],
)
def test_refused(data: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    result = recipe_runner.run(
        SCRIPT, f"data.root={data}", *SIZES, *arguments, f"run.dir={tmp_path / 'run'}"
    )
    assert result.code == 2 and said in result.err and len(result.err.strip().splitlines()) == 1, (
        result.err
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_two_ranks_see_the_same_batches(data: Path, tmp_path: Path, backend: str) -> None:
    """The losses of two processes, DeepSpeed's ZeRO-2 among them, are those of one, up to the order
    of sums."""
    arguments = [f"data.root={data}", *SIZES, *VARIANTS["linear and gan"]]
    recipe_runner.succeed(SCRIPT, *arguments, f"run.dir={tmp_path / 'one'}")
    arguments += [f"engine.backend={backend}", f"gan_engine.backend={backend}"]
    ranks = recipe_runner.run_ranks(SCRIPT, *arguments, f"run.dir={tmp_path / 'two'}", world=2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err[-2000:]
    one, two = (
        [row["loss"] for row in tiny_run.metrics(tmp_path / name)] for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-4)
