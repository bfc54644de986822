"""The tiny decoder's training: it learns the VAE's own decodings, goes on after a kill, and writes a
decoder for that VAE."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import recipe_runner
import tiny_run
import torch
from recipe_runner import At
from tiny_run import BACKWARD

from scd_sf.data.clips import Clip, write_clips, write_video
from scd_sf.files import sha256_file
from scd_sf.models.wan.tiny_vae import load_decoder, wan_2_1_latents
from scd_sf.models.wan.vae import load_vae
from scd_sf.tensor_files import read_tensors

SCRIPT = "recipes/pretrain_tiny_vae.py"
CONFIG = recipe_runner.ROOT / "recipes" / "configs" / "tiny_vae_doom.yaml"


def write_set(root: Path) -> None:
    (root / "clips").mkdir(parents=True)
    rng, rows = torch.Generator().manual_seed(0), []
    for number, split in enumerate(("train", "train", "val")):
        file = root / f"clips/{number}.mp4"
        video = torch.randint(256, (5, 3, 16, 16), generator=rng, dtype=torch.uint8)
        write_video(file, video, 16, crf=0, chroma="yuv444p")
        motions = ("still",) * 5
        about = (f"c{number}", split, "hall", "still", motions, 0.0, "a hall", "a room", 0, 1)
        rows.append(Clip(*about, f"clips/{number}.mp4", file.stat().st_size, sha256_file(file)))
    sizes = {"frames": 5, "height": 16, "width": 16, "fps": 16}
    write_clips(root, rows, sizes, {"made_by": "a test"})


def test_two_steps_and_on_after_a_kill(tmp_path: Path) -> None:
    write_set(tmp_path / "clips")
    base = recipe_runner.ROOT / "assets" / "wan_doom"

    def arguments(name: str, *more: str) -> list[str]:
        sizes = ["model.widths=[8, 4, 4, 4]", "train.steps=2", "train.save_every=1"]
        batch = ["train.global_batch=2", "train.micro_batch=1", "engine.warmup=0", "eval_clips=1"]
        places = [f"base={base}", f"data={tmp_path}/clips", f"run.dir={tmp_path}/{name}"]
        return ["--config", str(CONFIG), *places, *sizes, *batch, *more]

    result = recipe_runner.succeed(SCRIPT, *arguments("whole"))
    whole = tmp_path / "whole"
    tiny_run.check_words(result.out, whole)
    rows = tiny_run.metrics(whole)
    assert [row["step"] for row in rows] == [1, 2] and "val/psnr" in rows[1]
    report = json.loads((whole / "decoder" / "evaluation.json").read_text())
    assert report["clips"] == 1 and report["sha256"] == sha256_file(
        whole / "decoder" / "decoder.safetensors"
    )
    vae = load_vae(base)
    decoder = load_decoder(whole / "decoder", vae=vae)
    assert decoder.latents not in ("", wan_2_1_latents())

    target = read_tensors(whole / "targets" / "val" / "000000.safetensors")
    pixels = target["pixels"].float() / 127.5 - 1
    theirs = vae.decode(target["latents"][None])[0]
    assert (theirs - pixels).abs().max() <= 1 / 255 + 1e-5  # the VAE's own, in grey levels
    error = (decoder.decode(target["latents"][None])[0] - pixels).square().mean()
    psnr = float(10 * torch.log10(4 / error))
    assert abs(psnr - report["against_the_vae"]["psnr"]) < 0.01
    assert abs(psnr - rows[1]["val/psnr"]) < 0.1  # before rounding to fp16

    killed = recipe_runner.run(SCRIPT, *arguments("killed"), at=At(BACKWARD, 3, signal.SIGKILL))
    assert killed.code == -9, killed.err
    made = (tmp_path / "killed" / "targets" / "train" / "000000.safetensors").stat().st_mtime_ns
    recipe_runner.succeed(SCRIPT, *arguments("killed"))
    assert tiny_run.metrics(tmp_path / "killed") == rows
    assert (
        tmp_path / "killed" / "targets" / "train" / "000000.safetensors"
    ).stat().st_mtime_ns == made
    one, two = (
        read_tensors(tmp_path / name / "decoder" / "decoder.safetensors")
        for name in ("whole", "killed")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)

    wrong = recipe_runner.run(SCRIPT, *arguments("wrong", "model.patch=2"))
    assert wrong.code == 2 and "spatial=16" in wrong.err and "set model to match" in wrong.err
    assert not (tmp_path / "wrong").exists()
