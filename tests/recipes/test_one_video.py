"""One checkpoint, prompt and seed is one video: in `scd sample`, pipeline, validation video, row of
an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import Chain
from torch import Tensor

from scd_sf.config import load_config
from scd_sf.data.clips import read_video, write_video
from scd_sf.data.latents import LatentClips
from scd_sf.generation.folder import batches
from scd_sf.generation.generate import as_uint8, clips_of, decode, generate_latents
from scd_sf.generation.pipeline import SCDWanPipeline, export_pipeline
from scd_sf.generation.preview import Preview
from scd_sf.generation.sampling import SampleConfig, open_generator, wanted_videos
from scd_sf.models.build import load_student
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.vae import load_vae
from scd_sf.types import Conditioning, UserError, VideoShape

PROMPTS = ["left in meadow", "still in hall"]
SHAPE = VideoShape(3, 4, 4, 4)


def sampled(chain: Chain, *more: str, batch: int = 1) -> list[Tensor]:
    """Frames (F, 3, H, W) uint8 of every video that `scd sample` would make."""
    given = [f"checkpoint={chain.root}/stage3", "out=x", f"batch={batch}", *more]
    video_generator, _ = open_generator(load_config(SampleConfig, None, given), torch.device("cpu"))
    return [
        video
        for part in batches(wanted_videos(video_generator.cfg), batch, video_generator.cfg.history)
        for video in clips_of(video_generator.frames(part))
    ]


def same(left: Tensor, right: Tensor) -> None:
    """Equal pixels, up to the rounding of sums that another batch size takes in another order."""
    assert left.shape == right.shape
    distance = (left.int() - right.int()).abs()
    assert int(distance.max()) <= 1 and float(distance.float().mean()) < 0.01


@pytest.fixture(scope="module")
def pipe(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> SCDWanPipeline:
    out = tmp_path_factory.mktemp("one-video") / "exported"
    export_pipeline(chain.root / "stage3", out, dtype="fp32")
    return SCDWanPipeline.from_pretrained(out)


@pytest.fixture(scope="module")
def single(chain: Chain) -> dict[tuple[str, int], Tensor]:
    """Two prompts x two seeds, each made alone."""
    return {
        (prompt, seed): sampled(chain, f"prompts={json.dumps([prompt])}", f"seed={seed}")[0]
        for prompt in PROMPTS
        for seed in (7, 8)
    }


def test_two_prompts_and_two_seeds_are_the_four_single_runs(
    chain: Chain, single: dict[tuple[str, int], Tensor], tmp_path: Path
) -> None:
    """In one folder, in any batch and order, and with seeds that the prompts themselves bring."""
    order = [(PROMPTS[0], 7), (PROMPTS[0], 8), (PROMPTS[1], 7), (PROMPTS[1], 8)]
    for batch in (1, 3, 4):
        for key, video in zip(
            order,
            sampled(chain, f"prompts={json.dumps(PROMPTS)}", "samples=2", "seed=7", batch=batch),
            strict=True,
        ):
            same(video, single[key])
            assert batch > 1 or torch.equal(video, single[key])
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in reversed(order)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key, video in zip(
        reversed(order), sampled(chain, f"prompt_file={tmp_path}/p.jsonl"), strict=True
    ):
        assert torch.equal(video, single[key])


def test_the_script_the_pipeline_and_its_stream(
    chain: Chain, pipe: SCDWanPipeline, single: dict[tuple[str, int], Tensor], tmp_path: Path
) -> None:
    """The very files: lossless ones of equal pixels have equal bytes. A short clip is the beginning
    of a long one."""
    wanted = single[PROMPTS[1], 7]
    given = [
        f"checkpoint={chain.root}/stage3",
        f"prompts={json.dumps(PROMPTS[1:])}",
        "crf=0",
        "seed=7",
    ]
    recipe_runner.succeed("recipes/sample.py", *given, f"out={tmp_path}/out")
    write_video(tmp_path / "own.mp4", wanted, 16, crf=0)
    assert torch.equal(
        read_video(tmp_path / "out" / "0000-00.mp4"), read_video(tmp_path / "own.mp4")
    )
    assert torch.equal(as_uint8(pipe(PROMPTS[1], seed=7, output_type="pt").frames)[0], wanted)
    assert torch.equal(as_uint8(clips_of(pipe.stream(PROMPTS[1], seed=7)))[0], wanted)
    both = as_uint8(pipe(PROMPTS, seed=[8, 7], output_type="pt").frames)
    same(both[1], wanted)
    long = as_uint8(pipe(PROMPTS[1], seed=7, frames=25, output_type="pt").frames)[0]
    assert torch.equal(long[: len(wanted)], wanted)
    assert torch.equal(sampled(chain, *given[1:2], "seed=7", "frames=25")[0], long)


def test_a_change_of_the_prompt_keeps_to_its_video(
    chain: Chain, pipe: SCDWanPipeline, tmp_path: Path
) -> None:
    """Where the past is encoded again, too: other videos of the batch are those made alone."""
    rows = [
        {"prompt": PROMPTS[0], "then": then, "seed": seed}
        for seed, then in enumerate([[[5, PROMPTS[1]]], [[5, PROMPTS[1]]], [], [[9, PROMPTS[1]]]])
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"prompt_file={tmp_path}/p.jsonl", "frames=17", "window=2", "sink=1"]
    alone = sampled(chain, *given, "history=recache")
    for together, video in zip(
        sampled(chain, *given, "history=recache", batch=4), alone, strict=True
    ):
        same(together, video)
    assert not torch.equal(alone[0], sampled(chain, *given)[0])
    more: dict[str, Any] = {"frames": 17, "window": 2, "sink": 1, "output_type": "pt"}
    video = pipe(PROMPTS[0], seed=0, then={5: PROMPTS[1]}, history="recache", **more).frames
    assert torch.equal(as_uint8(video)[0], alone[0])
    with pytest.raises(UserError, match="history is 'none'"):
        pipe(PROMPTS[0], then={5: PROMPTS[1]}, history="none")


def test_a_video_that_is_made_anew(chain: Chain, pipe: SCDWanPipeline, tmp_path: Path) -> None:
    """By the folder's frames and by the pipeline, with each history of a later prompt, and with the
    strength that is the default: 0.8, of which this student knows 0.625."""
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (50, 3, 6, 8), dtype=torch.uint8, generator=rng)
    clip = tmp_path / "a.mp4"  # 25 frames at 16 per second
    write_video(clip, frames.repeat_interleave(8, 2).repeat_interleave(8, 3), 32, crf=0)
    row = {"prompt": PROMPTS[0], "seed": 7, "video": "a.mp4", "then": [[13, PROMPTS[1]]]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    given = [f"prompt_file={tmp_path}/p.jsonl", "window=2", "sink=1"]
    made = []
    for history, strength in (("keep", 0.85), ("recache", 0.85), ("flush", 0.85), ("keep", None)):
        own = [f"history={history}", *([f"strength={strength}"] if strength else [])]
        video = pipe(
            PROMPTS[0],
            seed=7,
            video=clip,
            strength=strength,
            then={13: PROMPTS[1]},
            history=history,
            window=2,
            sink=1,
            output_type="pt",
        ).frames
        made.append(sampled(chain, *given, *own)[0])
        assert len(made[-1]) == 25 and torch.equal(as_uint8(video)[0], made[-1])
    for index, one in enumerate(made[1:], 1):
        assert all(not torch.equal(one, other) for other in made[:index])
        assert index == 3 or torch.equal(one[:13], made[0][:13])
    assert torch.equal(sampled(chain, *given, "strength=0.625")[0], made[3])


def test_a_validation_video(
    chain: Chain, single: dict[tuple[str, int], Tensor], tmp_path: Path
) -> None:
    """Its prompts come from a folder of encoded ones, in float16; the i-th has seed i; each rank
    makes some."""
    student, config = load_student(chain.root / "stage3")
    states = load_text_encoder(chain.wan).encode(PROMPTS).text_BLE
    cond = Conditioning(states.half().float())
    preview = Preview(str(chain.wan), cond, SHAPE, config.sampler.build(), tmp_path)
    both, made = preview.sample(student, [0, 1])
    assert made.tolist() == [1, 1] and "quick/not_finite" not in preview.measure(both, made)
    for rank in (0, 1):
        alone = sampled(chain, f"prompts={json.dumps([PROMPTS[rank]])}", f"seed={rank}")[0]
        same(both[rank], alone)
        one, made = preview.sample(student, [rank])
        assert torch.equal(one[rank], alone) and made.tolist() == [rank == 0, rank == 1], (
            "as with two ranks"
        )
    states[1] = float("nan")
    preview.cond = Conditioning(states)
    parts = [preview.sample(student, [rank]) for rank in (0, 1)]
    videos, made = (sum(part) for part in zip(*parts, strict=True))
    found = preview.measure(videos, made)
    assert found.pop("quick/not_finite") == 1 and found == preview.measure(
        both[:1], torch.ones(1)
    ), "the whole one alone"
    assert preview.measure(videos, torch.zeros(2)) == {"quick/not_finite": 2}, "black is no measure"


def test_a_row_of_an_evaluation(chain: Chain, tmp_path: Path) -> None:
    """Its latents are those of generate() for the prompt and seed of each clip, and so are its
    pixels."""
    tiny_run.write_latents(tmp_path / "train", 24, held_out=True)
    tiny_run.write_latents(tmp_path / "val", 12, 1, held_out=True)
    rows = [{"name": "s", "checkpoint": "stage3", "stage": "3", "sampler": "renoise", "steps": 4}]
    given = [
        f"base={chain.wan}",
        f"train={tmp_path}/train",
        f"val={tmp_path}/val",
        f"root={chain.root}",
    ]
    given += [
        f"out={tmp_path}/out",
        "clips=4",
        "batch=3",
        f"rows={json.dumps(rows)}",
        "sample_stages=['3']",
    ]
    recipe_runner.succeed("recipes/evaluate.py", *given)
    latents = load_file(tmp_path / "out" / "samples" / "s.safetensors")["latents"]
    student, config = load_student(chain.root / "stage3")
    clips, vae = LatentClips(tmp_path / "val"), load_vae(chain.wan)
    index = 0  # the first reference clip
    cond = clips.batch([index], held_out=True).text
    for seed in (0, 1):
        chunks = generate_latents(
            student, cond, [1_000_003 * seed + index], SHAPE.latent(1)[1:], config.sampler.build()
        )
        alone = clips_of(chunks)
        torch.testing.assert_close(latents[seed, 0], alone[0], rtol=0, atol=1e-4)
        same(as_uint8(decode(vae, latents[seed, :1]))[0], as_uint8(decode(vae, alone))[0])
