"""``SCDWanPipeline`` does what people of diffusers type.

``PipelineTesterMixin`` is in the tests folder of diffusers' repository and not in its wheel, so it
cannot be imported here. These are own tests of what it checks and what applies: the signature, save
and load, one video alone and in a batch, videos per prompt, dict and tuple, components, dtypes,
devices, offloading, guidance, callbacks, embeddings. What does not apply: image variants,
schedulers, attention slicing, device maps, variants of files.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from scd_sf.data.clips import read_video, write_video
from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.generation.generate import as_uint8
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.pipeline import SCDWanPipeline, write_pipeline
from scd_sf.models.build import CheckpointConfig, ModelConfig, SamplerConfig, build_student
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.types import UserError

ROOT = Path(__file__).resolve().parents[2]
PROMPT, OTHER = "left in meadow", "still in hall"
DISTILLED, PLAIN = SamplerConfig("renoise", 2, 5.0), SamplerConfig("euler", 2, 5.0)


def write(root: Path, wan: Path, sampler: SamplerConfig) -> Path:
    """A pipeline directory of a random student."""
    scd = ScdConfig(encoder_layers=(0, 1, 2), decoder=DecoderConfig(layers=(0, 5)))
    config = CheckpointConfig(ModelConfig(wan=tiny_run.WAN, scd=scd), sampler)
    rng = torch.Generator().manual_seed(0)
    student = build_student(config.model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    origin: dict[str, object] = {"video": {"frames": 9, "height": 16, "width": 16}}
    write_pipeline(root, student, config, origin, wan, torch.float32)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``distilled`` and ``plain``: pipeline directories of the same student."""
    root = tmp_path_factory.mktemp("diffusers")
    wan = tiny_run.write_wan(root / "wan")
    write(root / "distilled", wan, DISTILLED)
    write(root / "plain", wan, PLAIN)
    return root


@pytest.fixture(scope="module")
def pipe(root: Path) -> SCDWanPipeline:
    pipe = SCDWanPipeline.from_pretrained(root / "distilled")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(root: Path) -> SCDWanPipeline:
    """Not distilled."""
    pipe = SCDWanPipeline.from_pretrained(root / "plain")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def video(pipe: SCDWanPipeline) -> np.ndarray:
    """The clip of PROMPT and seed 0, (F, H, W, 3)."""
    clip: np.ndarray = pipe(PROMPT).frames[0]
    return clip


def close(one: Any, two: Any) -> bool:
    """Equal up to the rounding of sums that another batch size takes in another order."""
    return np.shape(one) == np.shape(two) and float(np.abs(np.asarray(one) - two).max()) < 1e-4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------- the table of conventions


@dataclass(frozen=True)
class Convention:
    """``what`` people type, and whether (pipe, clip of PROMPT and seed 0) does what they expect."""

    what: str
    holds: Callable[[SCDWanPipeline, np.ndarray], bool]


def batch(pipe: SCDWanPipeline, **given: Any) -> np.ndarray:
    frames: np.ndarray = pipe(PROMPT, **given).frames
    return frames


CONVENTIONS = [
    Convention("a DiffusionPipeline", lambda pipe, _: isinstance(pipe, DiffusionPipeline)),
    Convention("pipe.device", lambda pipe, _: pipe.device == torch.device("cpu")),
    Convention("pipe.dtype", lambda pipe, _: pipe.dtype == torch.float32),
    Convention("pipe.to('cpu') is pipe", lambda pipe, _: pipe.to("cpu") is pipe),
    Convention(
        "pipe.to('cpu', torch.float32)",
        lambda pipe, _: pipe.to("cpu", torch.float32).to(device="cpu", dtype=torch.float32) is pipe,
    ),
    Convention("print(pipe)", lambda pipe, _: "text_encoder" in str(pipe)),
    Convention(
        "pipe.components",
        lambda pipe, _: set(pipe.components) == {"transformer", "vae", "text_encoder", "tokenizer"},
    ),
    Convention(
        "frames[0] is what export_to_video takes: float (F, H, W, 3) in [0, 1]",
        lambda pipe, clip: (
            clip.shape == (9, 16, 16, 3)
            and clip.dtype == np.float32
            and 0 <= clip.min() < clip.max() <= 1
        ),
    ),
    Convention(
        "output_type='pt'",
        lambda pipe, clip: close(batch(pipe, output_type="pt")[0].permute(0, 2, 3, 1), clip),
    ),
    Convention(
        "output_type='pil'",
        lambda pipe, clip: np.array_equal(
            np.stack([np.asarray(image) for image in batch(pipe, output_type="pil")[0]]),
            as_uint8(torch.from_numpy(clip)).numpy(),
        ),
    ),
    Convention(
        "output_type='latent' is (B, C, F, H, W)",
        lambda pipe, _: batch(pipe, output_type="latent").shape == (1, 4, 3, 2, 2),
    ),
    Convention(
        "return_dict=False is a tuple",
        lambda pipe, clip: np.array_equal(pipe(PROMPT, return_dict=False)[0][0], clip),
    ),
    Convention(
        "height, width, num_frames",
        lambda pipe, _: batch(pipe, height=16, width=32, num_frames=5).shape == (1, 5, 16, 32, 3),
    ),
    Convention(
        "frames= and seed=, the names of before",
        lambda pipe, clip: np.array_equal(batch(pipe, frames=5, seed=np.int64(0))[0], clip[:5]),
    ),
    Convention(
        "num_inference_steps that are its own",
        lambda pipe, clip: np.array_equal(batch(pipe, num_inference_steps=2)[0], clip),
    ),
    Convention(
        "generator: the same state, the same video",
        lambda pipe, clip: (
            np.array_equal(batch(pipe, generator=seeded(3)), batch(pipe, generator=seeded(3)))
            and not close(batch(pipe, generator=seeded(3))[0], clip)
        ),
    ),
    Convention(
        "generator goes on from call to call",
        lambda pipe, _: (
            not close(batch(pipe, generator=(rng := seeded(3))), batch(pipe, generator=rng))
        ),
    ),
    Convention(
        "a list of generators, one for each video: alone or in a batch",
        lambda pipe, _: close(
            pipe([PROMPT, OTHER], generator=[seeded(3), seeded(4)]).frames[1],
            pipe(OTHER, generator=seeded(4)).frames[0],
        ),
    ),
    Convention(
        "num_videos_per_prompt: those of a prompt together, each as alone",
        lambda pipe, clip: (
            (both := pipe([PROMPT, OTHER], num_videos_per_prompt=2).frames).shape[0] == 4
            and close(both[0], clip)
            and close(both[3], pipe(OTHER, seed=1).frames[0])
        ),
    ),
    Convention(
        "encode_prompt, prompt_embeds",
        lambda pipe, clip: np.array_equal(
            pipe(prompt_embeds=pipe.encode_prompt(PROMPT, None, False)[0]).frames[0], clip
        ),
    ),
    Convention(
        "prompt_embeds without their padding",
        lambda pipe, clip: np.array_equal(
            pipe(prompt_embeds=pipe.encode_prompt(PROMPT)[0][:, :8]).frames[0], clip
        ),
    ),
    Convention(
        "guidance_scale of 1 and less is off",
        lambda pipe, clip: (
            np.array_equal(batch(pipe, guidance_scale=1.0)[0], clip)
            and np.array_equal(batch(pipe, guidance_scale=0.0)[0], clip)
            and not pipe.do_classifier_free_guidance
        ),
    ),
    Convention(
        "negative_prompt with guidance_scale",
        lambda pipe, clip: (
            not close(far := batch(pipe, guidance_scale=4.0, negative_prompt=OTHER)[0], clip)
            and not close(far, batch(pipe, guidance_scale=4.0)[0])
            and pipe.do_classifier_free_guidance
            and pipe.guidance_scale == 4.0
        ),
    ),
    Convention(
        "negative_prompt_embeds",
        lambda pipe, _: np.array_equal(
            batch(pipe, guidance_scale=4.0, negative_prompt=OTHER),
            pipe(
                guidance_scale=4.0,
                prompt_embeds=(states := pipe.encode_prompt(PROMPT, OTHER))[0],
                negative_prompt_embeds=states[1],
            ).frames,
        ),
    ),
    Convention(
        "one negative prompt for each prompt",
        lambda pipe, _: close(
            pipe([PROMPT, PROMPT], ["", OTHER], guidance_scale=4.0).frames[1],
            pipe(PROMPT, OTHER, guidance_scale=4.0).frames[0],
        ),
    ),
    Convention(
        "latents: the same noise, the same first step",
        lambda pipe, clip: (
            np.array_equal(
                batch(pipe, latents=(x := torch.randn(1, 4, 3, 2, 2, generator=seeded(5)))),
                batch(pipe, latents=x.clone()),
            )
            and not close(batch(pipe, latents=x)[0], clip)
        ),
    ),
    Convention(
        "a list of prompts",
        lambda pipe, clip: len(both := pipe([PROMPT, OTHER]).frames) == 2 and close(both[0], clip),
    ),
]


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.what)
def test_convention(convention: Convention, pipe: SCDWanPipeline, video: np.ndarray) -> None:
    assert convention.holds(pipe, video)


def test_the_signature_is_that_of_wan() -> None:
    """All of ``WanPipeline``'s arguments, but those of its attention, a second transformer and the
    length of prompts, which is the encoder's."""
    ours = set(inspect.signature(SCDWanPipeline.__call__).parameters)
    theirs = set(inspect.signature(WanPipeline.__call__).parameters)
    assert theirs - ours == {"attention_kwargs", "guidance_scale_2", "max_sequence_length"}
    streamed = set(inspect.signature(SCDWanPipeline.stream).parameters)
    assert ours - streamed == {"return_dict"}
    assert {"image", "video", "strength", "window", "sink", "start", "then"} <= streamed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "steps of a distilled student": (
        {"num_inference_steps": 50},
        "num_inference_steps is 50, but .*distilled for 2 steps",
    ),
    "a sampler and other steps": (
        {"num_inference_steps": 3, "sampler": PLAIN},
        "num_inference_steps is 3, but sampler has 2",
    ),
    "output_type": ({"output_type": "gif"}, "output_type is 'gif'; use np, pt, pil, latent"),
    "two numbers of frames": ({"frames": 9}, "num_frames is 5 and frames 9"),
    "seed and generator": ({"seed": 1, "generator": seeded(1)}, "seed and generator"),
    "generators": ({"generator": [seeded(1)] * 2}, "a list of 2 for 1 videos"),
    "no videos": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
    "two guidances": (
        {"guidance_scale": 2.0, "guidance": SampleGuidance(corruption=2)},
        "guidance_scale and guidance",
    ),
    "both prompts": ({"prompt_embeds": torch.zeros(1, 2, 8)}, "one of prompt and prompt_embeds"),
    "embeds": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 2, 9)},
        r"prompt_embeds has shape \(1, 2, 9\)",
    ),
    "no prompts": ({"prompt": []}, "prompt: give a text, or a list of texts"),
    "a prompt that is no text": ({"prompt": 3}, "prompt: give a text, or a list of texts"),
    "a seed that is none": ({"seed": "a"}, "seed is 'a'; give a whole number"),
    "a generator that is none": ({"generator": 3}, "generator: give a torch.Generator"),
    "latents that are none": ({"latents": np.zeros(3)}, r"latents has shape \(3,\); give a tensor"),
    "later prompts": ({"then": "abc"}, "then: give {pixel frame: prompt}"),
    "no prompt": ({"prompt": None}, "one of prompt and prompt_embeds"),
    "negative prompts": (
        {"guidance_scale": 2.0, "negative_prompt": ["a", "b"]},
        "1 prompts but 2 negative prompts",
    ),
    "latents": ({"latents": torch.zeros(1, 3, 4, 2, 2)}, r"latents has shape .*\(1, 4, 2, 2, 2\)"),
    "image and start": ({"image": Image.new("RGB", (9, 9)), "start": "a.png"}, "image and start"),
    "video and start": ({"video": "a.mp4", "start": "a.png"}, "video excludes image and start"),
    "a video of another kind": (
        {"video": 3, "strength": 1},
        "video: is a int; give a path or a list",
    ),
    "a video of no frame": ({"video": [], "strength": 1}, "video: holds no frame"),
    "a short video": (
        {"video": np.zeros((8, 9, 9, 3), np.uint8), "num_frames": 9, "strength": 1},
        "gives 8 frames, of which 5 can be made anew, not 9",
    ),
    "a strength of nothing": ({"strength": 0.5}, "strength is 0.5, but there is no video"),
    "too little strength": (
        {"video": np.zeros((9, 9, 9, 3), np.uint8), "strength": 0.1},
        "below all noise levels",
    ),
    "an image of another kind": ({"image": 3}, "image: is a int; give a PIL image"),
    "an image's shape": ({"image": torch.zeros(4, 9, 9)}, r"image: has shape \(4, 9, 9\)"),
    "an image's values": ({"image": np.full((9, 9, 3), 9.0)}, "values are 9 to 9"),
    "images": ({"image": [Image.new("RGB", (9, 9))] * 2}, "image: 2 for 1 prompts"),
    "part of a frame": ({"num_frames": 5.5}, "num_frames is 5.5; give a whole number"),
    "half a video": ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt is 1.5"),
    "a window in words": ({"window": "3"}, "window is '3'; give a whole number"),
    "a scale in words": ({"guidance_scale": "3"}, "guidance_scale is '3'; give a number"),
    "a list of latents": ({"latents": [1]}, "latents has shape list; give a tensor"),
    "a list of embeds": ({"prompt": None, "prompt_embeds": [1]}, "prompt_embeds: give a tensor"),
    "no embeds": ({"prompt": None, "prompt_embeds": torch.zeros(0, 2, 8)}, "prompt_embeds: give"),
    "a start of no frame": ({"start": np.zeros((0, 9, 9, 3), np.uint8)}, "start: holds no frame"),
    "a prompt after the end": (
        {"then": {5: "a"}},
        "then: frame 5 is too late: .* after frame 1 of",
    ),
    "a prompt in the last frames": ({"then": {2: "a"}}, "then: frame 2 is too late"),
    "two prompts at once": (
        {"num_frames": 9, "then": {2: "a", 5: "b"}},
        "frames 2 and 5 would both begin with frame 5",
    ),
    "two prompts within a start": (
        {
            "start": np.zeros((5, 9, 9, 3), np.uint8),
            "num_frames": 9,
            "then": {1: "a", 3: "b"},
        },
        "frames 1 and 3 would both begin with frame 5",
    ),
    "a history that is none": ({"history": "none"}, "history is 'none'; use keep"),
    "a history without prompts": ({"history": "flush"}, "history is 'flush', .* none changes"),
    "a negative window": ({"window": -1}, "window -1 and sink 0 must be"),
    "two videos": ({"video": ["a.mp4", "b.mp4"]}, "video: is a list of videos, and one serves"),
    "videos in memory": (
        {"video": [np.zeros((9, 9, 9, 3), np.uint8)] * 2},
        "video: is a list of videos",
    ),
    "a video with a bad frame": (
        {"video": [np.zeros((9, 9, 3), np.uint8)] * 8 + [np.zeros((9, 9, 4), np.uint8)]},
        r"video: has shape \(9, 9, 4\)",
    ),
    "a transparent frame": (
        {"video": [Image.new("RGB", (9, 9))] * 4 + [Image.new("RGBA", (9, 9))]},
        "video: has transparent parts",
    ),
    "a strength in words": ({"video": [], "strength": "0.5"}, "strength is '0.5'; give a number"),
    "a negative strength": ({"video": [], "strength": -1}, "strength is -1; it must be above 0"),
    "no window": ({"window": None}, "window is None; give a whole number"),
    "a frame twice": ({"then": [(1, "a"), (1, "b")]}, "then: gives two prompts"),
    "a callback that is none": ({"callback_on_step_end": 3}, "callback_on_step_end is a int"),
    "what is no answer": ({"callback_on_step_end": lambda *_: 5}, 'return {"latents": tensor}'),
    "no latents of a callback": (
        {"callback_on_step_end": lambda *_: {"latents": None}},
        'return {"latents": tensor}',
    ),
    "then": ({"then": {0: "a"}}, "then: 0 is no pixel frame"),
    "a sampler by name": ({"sampler": "unipc"}, "sampler is 'unipc'; give a SamplerConfig"),
    "a guidance that is a number": ({"guidance": 4.0}, "guidance is 4.0; give a SampleGuidance"),
    "sink": ({"sink": 2}, "a sink needs a window"),
    "a callback's tensors": (
        {
            "callback_on_step_end": lambda *_: {},
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        },
        "names prompt_embeds; only latents",
    ),
    "what a callback returns": (
        {"callback_on_step_end": lambda *_: {"prompt_embeds": 1}},
        "returns prompt_embeds; only latents",
    ),
    "latents of a callback": (
        {"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}},
        "returns latents of shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, pipe: SCDWanPipeline) -> None:
    """One line for people, a ValueError for diffusers' users; no video and no other meaning. Said
    before anything is computed, but for what a callback returns."""
    given, words = REFUSED[name]
    encoded: list[int] = []
    hook = pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    with pytest.raises(UserError, match=words):
        pipe(**{"prompt": PROMPT, "num_frames": 5, **given})
    hook.remove()
    assert not encoded or callable(given.get("callback_on_step_end")), "said too late"


def test_other_steps_of_a_student_that_is_not_distilled(plain: SCDWanPipeline) -> None:
    three = plain(PROMPT, num_inference_steps=3).frames
    assert np.array_equal(three, plain(PROMPT, sampler=SamplerConfig("euler", 3, 5.0)).frames)
    assert not close(three, plain(PROMPT).frames) and plain.num_timesteps == 2 * 3


def test_a_negative_prompt_without_guidance_warns(
    pipe: SCDWanPipeline, video: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(pipe(PROMPT, negative_prompt=OTHER).frames[0], video)
    assert "negative_prompt has no effect" in caplog.text


# --------------------------------------------------------------------------- start, switch, window


def test_a_video_in_every_form(pipe: SCDWanPipeline, tmp_path: Path) -> None:
    """As long as it is, but for what fills no chunk; the same as a path, pictures, arrays and
    tensors. Strength 1 is the clip from noise."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (15, 2, 2, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    calls: list[float] = []

    def count(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(float(t))
        return {}

    def anew(video: object, **more: Any) -> np.ndarray:
        clips: np.ndarray = pipe(PROMPT, video=video, seed=3, **{"strength": 0.9, **more}).frames
        return clips

    made = anew(list(frames), callback_on_step_end=count)
    assert made.shape == (1, 13, 16, 16, 3)
    assert calls == pytest.approx([5000 / 6] * 4)  # the second of the times 1 and 5/6, four chunks
    assert pipe.num_timesteps == 4
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    images = [Image.fromarray(frame) for frame in frames]
    for video in (images, frames, tensor, tensor / 255, tuple(frames[:13])):
        assert np.array_equal(anew(video), made)
    assert np.array_equal(anew(frames, num_frames=9)[0], made[0, :9])
    pair = pipe([PROMPT, OTHER], video=frames, seed=3, strength=0.9).frames
    assert close(pair[0], made[0]) and float(np.abs(pair[1] - pair[0]).max()) > 1e-3
    write_video(tmp_path / "a.mp4", tensor, 16, crf=0, chroma="yuv444p")
    assert np.array_equal(anew(tmp_path / "a.mp4"), anew(read_video(tmp_path / "a.mp4")))
    from_noise = pipe(PROMPT, seed=3, num_frames=13).frames
    assert np.array_equal(anew(frames, strength=1), from_noise)
    assert float(np.abs(made - from_noise).max()) > 1e-2
    least = pipe(PROMPT, video=frames, seed=3).frames  # the least noise that it knows is above 0.8
    assert np.array_equal(least, made)


def test_a_start_frame_in_every_form(pipe: SCDWanPipeline, tmp_path: Path) -> None:
    """PIL, array, tensor, path: the same video; it begins with the picture as the VAE gives it
    back."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    made = pipe(PROMPT, image=Image.fromarray(picture)).frames
    forms = [picture, tensor, tensor / 255, tmp_path / "a.png", str(tmp_path / "a.png")]
    for image in forms:
        assert np.array_equal(pipe(PROMPT, image=image).frames, made), type(image)
    assert np.array_equal(pipe(PROMPT, start=str(tmp_path / "a.png")).frames, made)
    assert not close(made[0][0], pipe(PROMPT).frames[0][0])
    dark = np.zeros_like(picture)
    two = pipe([PROMPT, PROMPT], image=np.stack([dark, picture]), num_videos_per_prompt=2).frames
    assert close(two[2], made[0]) and not close(two[0], made[0])
    frames = np.stack([picture] * 5)
    write_video(tmp_path / "a.mp4", torch.from_numpy(frames).permute(0, 3, 1, 2)[:, :, :, :16], 16)
    for start in (tmp_path / "a.mp4", frames, torch.from_numpy(frames).permute(0, 3, 1, 2)):
        assert len(pipe(PROMPT, start=start).frames[0]) == 9
        assert pipe.num_timesteps == 2, "one chunk was left to generate"
    with pytest.raises(UserError, match="start start: fills all 5 frames"):
        pipe(PROMPT, start=frames, num_frames=5)


def test_stream(pipe: SCDWanPipeline, video: np.ndarray) -> None:
    """In pieces of every type what a call gives whole; window, sink, guidance and later prompts have
    effect."""
    parts = list(pipe.stream(PROMPT))
    assert [tuple(part.shape) for part in parts] == [(1, 1, 3, 16, 16)] + [(1, 4, 3, 16, 16)] * 2
    assert np.array_equal(torch.cat(parts, 1)[0].permute(0, 2, 3, 1), video)
    assert np.array_equal(np.concatenate(list(pipe.stream(PROMPT, output_type="np")), 1)[0], video)
    assert [len(part[0]) for part in pipe.stream(PROMPT, output_type="pil")] == [1, 4, 4]
    latents = torch.cat(list(pipe.stream(PROMPT, output_type="latent")), 2)
    assert torch.equal(latents, pipe(PROMPT, output_type="latent").frames)

    def late(**given: Any) -> Tensor:
        return torch.cat(list(pipe.stream(PROMPT, num_frames=17, **given)), 1)

    plain, switched = late(), late(then={9: OTHER})
    assert torch.equal(plain[:, :9], switched[:, :9]) and not torch.equal(plain, switched)
    assert torch.equal(switched, late(then=[(9, [OTHER])])), "pairs, and a list with one a prompt"
    assert torch.equal(switched[:, :9], late(window=3)[:, :9])
    assert not torch.equal(plain, late(window=2)) and not torch.equal(
        late(window=2), late(window=2, sink=1)
    )
    guided = late(guidance=SampleGuidance(GuidanceConfig(3.0), scope="decoder"))
    assert not torch.equal(plain, guided) and not torch.equal(guided, late(guidance_scale=3.0))
    assert not torch.equal(plain, late(guidance=SampleGuidance(corruption=1.5)))


# --------------------------------------------------------------------------------------- callbacks


def test_callbacks(pipe: SCDWanPipeline, video: np.ndarray) -> None:
    """After every step of every chunk, with its latents, which may be replaced; a clip may be ended
    early."""
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def watch(same: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert same is pipe
        seen.append((step, float(t), tuple(tensors["latents"].shape)))
        return tensors

    assert np.array_equal(pipe(PROMPT, callback_on_step_end=watch).frames[0], video)
    assert [step for step, _, _ in seen] == list(range(pipe.num_timesteps)) == list(range(6))
    assert seen[0] == (0, 1000.0, (1, 4, 1, 2, 2)) and 0 < seen[1][1] < 1000
    nothing = pipe(
        PROMPT, callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=[]
    )
    assert np.array_equal(nothing.frames[0], video)

    def blank(_: Any, step: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    zeros = pipe(PROMPT, output_type="latent", callback_on_step_end=blank).frames
    assert float(zeros.abs().max()) == 0

    def stop(same: Any, step: int, _: Tensor, __: dict[str, Tensor]) -> dict[str, Tensor]:
        same._interrupt = step >= 2
        return {}

    assert np.array_equal(pipe(PROMPT, callback_on_step_end=stop).frames[0], video[:5])
    assert np.array_equal(pipe(PROMPT).frames[0], video), "the next call is whole"


def test_a_directory_that_is_no_pipeline(tmp_path: Path) -> None:
    tiny_run.write_wan(tmp_path / "wan")
    for directory in (tmp_path, tmp_path / "wan"):
        with pytest.raises(UserError, match=r"no pipeline directory; make one .*'scd export"):
            SCDWanPipeline.from_pretrained(directory)


def test_progress_bar(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = SCDWanPipeline.from_pretrained(root / "distilled")
    pipe(PROMPT)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------- files, dtypes, parts, offloading


def test_diffusers_own_loader_says_how(root: Path) -> None:
    """diffusers makes pipelines of its own classes, or from code in the directory, which there is
    none of."""
    with pytest.raises(AttributeError, match=r"scd_sf\.generation\.pipeline\.SCDWanPipeline"):
        DiffusionPipeline.from_pretrained(root / "distilled")
    index = json.loads((root / "distilled" / "model_index.json").read_text())
    module, _, name = index["_class_name"].rpartition(".")
    assert (module, name) == (SCDWanPipeline.__module__, SCDWanPipeline.__name__)


def test_made_of_the_components_of_another(pipe: SCDWanPipeline, video: np.ndarray) -> None:
    again = SCDWanPipeline(**pipe.components, description=pipe.description)
    assert np.array_equal(again(PROMPT).frames[0], video)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(root: Path, video: np.ndarray, dtype: torch.dtype, tmp_path: Path) -> None:
    """``torch_dtype=`` and ``.to(dtype)`` are the same; the VAE stays fp32; saved, it is read
    again."""
    half = SCDWanPipeline.from_pretrained(root / "distilled", torch_dtype=dtype)
    assert half.dtype == dtype and half.vae.dtype == torch.float32
    frames = half(PROMPT).frames[0]
    assert frames.dtype == np.float32 and np.abs(frames - video).max() < 0.1
    cast = SCDWanPipeline.from_pretrained(root / "distilled")
    original = {name: tensor.clone() for name, tensor in cast.vae.state_dict().items()}
    cast.to(dtype)
    assert {part.dtype for part in (cast, half)} == {dtype} == {cast.text_encoder.dtype}
    assert all(
        torch.equal(tensor, original[name]) for name, tensor in cast.vae.state_dict().items()
    )
    assert np.array_equal(cast(PROMPT).frames[0], frames)
    half.save_pretrained(tmp_path / "again")
    again = SCDWanPipeline.from_pretrained(tmp_path / "again", dtype=dtype)
    assert np.array_equal(again(PROMPT).frames[0], frames)
    with pytest.raises(UserError, match=r"dtype is torch\.float32 and torch_dtype"):
        SCDWanPipeline.from_pretrained(root / "plain", dtype=torch.float32, torch_dtype=dtype)
    with pytest.raises(UserError, match=r"dtype is torch\.int8"):
        cast.to(torch.int8)


def test_exchanged_parts_are_used_and_not_lost(root: Path, tmp_path: Path) -> None:
    """The pipeline decodes with the VAE that it has now, and does not save another one."""
    pipe, wan = SCDWanPipeline.from_pretrained(root / "plain"), tmp_path / "wan"
    tiny_run.write_wan(wan, seed=1)
    before = pipe(PROMPT).frames
    own, pipe.vae = pipe.vae, type(pipe.vae).from_pretrained(wan / "vae")
    assert not close(pipe(PROMPT).frames, before)
    with pytest.raises(UserError, match="vae was exchanged"):
        pipe.save_pretrained(tmp_path / "out")
    pipe.vae = own
    assert np.array_equal(pipe(PROMPT).frames, before)


def offloaded(pipe: SCDWanPipeline, device: str) -> list[str]:
    """The parts in the order in which offloading brought them to ``device``."""
    pipe.enable_model_cpu_offload(device=device)
    order: list[str] = []
    for name in ("text_encoder", "transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook

        def note(*args: Any, name: str = name, before: Any = hook.pre_forward, **more: Any) -> Any:
            order.append(name)
            return before(*args, **more)

        hook.pre_forward = note
    return order


def test_model_offload_brings_every_part(root: Path, video: np.ndarray) -> None:
    """On the CPU, where nothing moves, but the hooks are those of a GPU. accelerate's hooks are of
    ``forward``, which the student and the streamed VAE are not called by."""
    pipe = SCDWanPipeline.from_pretrained(root / "distilled")
    order = offloaded(pipe, "cpu")
    assert np.array_equal(pipe(PROMPT).frames[0], video)
    distinct = list(dict.fromkeys(order))
    assert distinct == ["text_encoder", "transformer", "vae"], order
    order = offloaded(pipe, "cpu")
    parts = pipe.stream(PROMPT)
    next(parts)
    assert set(order) == {"text_encoder", "transformer", "vae"}
    parts.close()
    with pytest.raises(UserError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


def test_the_how_to_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of Python in docs/how_to/diffusers.md, one after the other, as a reader would."""
    page = (ROOT / "docs" / "how_to" / "diffusers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").symlink_to(root / "distilled")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/how_to/diffusers.md", "exec"), names)
    assert names["clip"].shape == (9, 16, 16, 3) and len(read_video(tmp_path / "car.mp4")) == 9
    assert (len(names["videos"]), len(names["videos"][0])) == (4, 17)
    assert names["frames"].shape == (1, 4, 16, 16, 3) and len(names["short"]) == 9


@pytest.mark.gpu
def test_on_a_gpu(root: Path, video: np.ndarray) -> None:
    pipe = SCDWanPipeline.from_pretrained(root / "distilled").to("cuda")
    assert pipe.device.type == "cuda" and np.abs(pipe(PROMPT).frames[0] - video).max() < 1e-2
    pipe.to("cpu").enable_model_cpu_offload()
    picture = Image.new("RGB", (16, 16))
    assert np.abs(pipe(PROMPT).frames[0] - video).max() < 1e-2
    assert pipe(PROMPT, OTHER, image=picture, guidance_scale=3.0).frames.shape == (1, 9, 16, 16, 3)
    assert {
        next(pipe.components[name].parameters()).device.type for name in ("vae", "transformer")
    } == {"cpu"}
    with pytest.raises(UserError, match=r"leave \.to"):
        pipe.to("cuda")
