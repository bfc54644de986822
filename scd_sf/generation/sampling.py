"""From prompts to frames, as ``recipes/sample.py`` and ``scd sample`` make them (files:
generation/folder.py).

The frames come from generation/generate.py as they are decoded: memory does not grow with length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import absolute
from scd_sf.data.prompt_files import PromptRow, read_prompt_file
from scd_sf.data.start import VIDEOS as VIDEO_SUFFIXES
from scd_sf.data.start import check_start, count_pictures, read_pictures, read_start
from scd_sf.diffusion.samplers import Sampler, first_step
from scd_sf.files import sha256_file
from scd_sf.generation.compile import CompileConfig, compile_steps
from scd_sf.generation.generate import as_uint8, check_window, generate
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.inputs import ChunkInput, chunk_inputs
from scd_sf.generation.prompt_change import PromptChange, check_history
from scd_sf.generation.request import (
    SIZES_ASKED,
    check_past,
    check_strength,
    choose_sampler,
    choose_shape,
    choose_strength,
    input_frames,
    unusual,
)
from scd_sf.models.blocks import BlocksConfig
from scd_sf.models.build import (
    CheckpointConfig,
    SamplerConfig,
    Student,
    base_of,
    describe_checkpoint,
    load_student,
)
from scd_sf.models.wan.text import TextEncoder, wan_negative
from scd_sf.models.wan.text_cache import open_text_encoder
from scd_sf.models.wan.tiny_vae import TinyVae, decoder_file, load_decoder
from scd_sf.models.wan.vae import Vae, load_vae
from scd_sf.nn.kv_cache import CacheConfig
from scd_sf.tensor_files import dtype_of
from scd_sf.types import Conditioning, UserError, VideoShape, check_within

FPS = 1000  # no player shows more
VIDEOS = 2**22  # of one folder: their list alone takes a GB


@dataclass
class SampleConfig:
    """What videos are made from. Times and sizes of 0 are the trained ones."""

    checkpoint: str
    """A run directory, a step_N of it, or an exported file."""
    out: str
    """Folder for the videos and their manifest."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; or give ``prompt_file``."""
    prompt_file: str = ""
    """Prompts in a txt, csv or jsonl file; a jsonl row may have seed, start or video, and later
    prompts."""
    prompt_column: str = "prompt"
    """Column or key of the prompts in a csv or jsonl file."""
    base: str = ""
    """The Wan directory with VAE and text encoder; empty: the one that the checkpoint was made
    from."""
    weights: str = "ema"
    """Which weights of the checkpoint: ema, model or best."""
    samples: int = 1
    """Videos per prompt."""
    seed: int = 0
    """The n-th video of a prompt has seed + n."""
    frames: int = 0
    """Frames; 0: as trained, or of a ``video`` all that fill chunks."""
    height: int = 0
    """Pixels; 0: as trained."""
    width: int = 0
    """Pixels; 0: as trained."""
    sampler: SamplerConfig | None = None
    """Sampler and steps; null: the checkpoint's own."""
    force: bool = False
    """Allow another sampler on a distilled checkpoint."""
    guidance: SampleGuidance = field(default_factory=SampleGuidance)
    """Guidance; off by default."""
    negative_prompt: str = ""
    """What text guidance leads away from; wan: Wan 2.1's own; empty: the empty prompt."""
    text_cache: str = ""
    """Folder that keeps encoded prompts; empty: in the user's cache; off: nowhere."""
    start: str = ""
    """An image or video that all videos continue, a video at ``fps``; empty: none."""
    video: str = ""
    """A video file, read at ``fps``, that is made anew after each prompt; no student is trained for
    it; empty: none."""
    strength: float | None = None
    """How much noise ``video`` begins with, 1: nothing is left of it; the sampler's first time at or
    below is taken; null: 0.8, or the sampler's least where that is more."""
    window: int = 0
    """The last latent frames of history that are kept, for videos longer than training; 0: all."""
    sink: int = 0
    """Latent frames at the beginning that stay, too, beside the window's."""
    history: str = "keep"
    """What becomes of the past where the prompt changes: keep, recache (encode it again under the
    new prompt) or flush (forget all but the last chunk)."""
    dtype: str = "fp32"
    """Type of the student and the text encoder: fp32, bf16 or fp16; the VAE computes in fp32."""
    blocks: BlocksConfig | None = None
    """Which blocks of the causal baseline run, such as the skip-layer schedule; null: as the
    checkpoint says."""
    decoder: str = ""
    """A tiny decoder's file or folder, for previews: faster and less true than the VAE's own, and
    not to be scored; empty: the VAE's."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """What is compiled or replayed."""
    batch: int = 4
    """Videos generated together."""
    fps: int = 16
    """Frames per second of the files."""
    crf: int = 16
    """Quality of the files: 0 (best) .. 51."""

    def __post_init__(self) -> None:
        check_within(self, {"samples": (1, 1e9), "batch": (1, 1e6), "fps": (1, FPS)})
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more")
        check_history(self.history)
        CacheConfig.sampling(self.window, self.sink, 1)  # refuses what makes no sense
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf is {self.crf}; it must be 0 (best) .. 51")
        check_within(self, SIZES_ASKED)
        if self.start and self.video:
            raise UserError(
                "start and video are both set: one is continued, one is made anew; choose"
            )
        check_strength(self.strength, True)
        if self.negative_prompt and self.guidance.text.w == 1:
            raise UserError(
                "negative_prompt is what guidance.text leads away from: set guidance.text.scale too"
            )
        if self.force and self.sampler is None:
            raise UserError(
                "force is for another sampler than the checkpoint's own: set sampler, or drop it"
            )
        self.negative_prompt = wan_negative(self.negative_prompt)
        dtype_of(self.dtype)


@cache
def start_sha256(path: str) -> str:
    """sha256 of a start file or an input video, which is read once for all that is made of it."""
    return sha256_file(Path(path))


count_cached = cache(count_pictures)


@cache
def count_start(path: Path, size: tuple[int, int], fps: float) -> int:
    """Frames of a start file, all of which are decoded. UserError: one cannot be used."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return count_pictures(path, size, fps, f"start {path}")
    return len(read_start(path, size, 1, fps))


# what a record has only where it was asked for
EXTRAS = ("title", "then", "start", "start_sha256", "video", "video_sha256")


@dataclass(frozen=True)
class VideoRequest:
    """One video to make: ``file`` (posix, inside the output folder) of the ``sample``-th video of a
    prompt.

    ``title``: the prompt that a benchmark knows it by, where it is sampled from another wording.
    """

    file: str
    row: PromptRow
    prompt_index: int
    sample: int
    seed: int
    title: str = ""

    def record(self) -> dict[str, object]:
        """The video's entry in the manifest."""
        extra: dict[str, object] = {"title": self.title} if self.title else {}
        if self.row.then:
            extra["then"] = [list(change) for change in self.row.then]
        if self.row.start:
            extra |= {"start": self.row.start, "start_sha256": start_sha256(self.row.start)}
        if self.row.video:
            extra |= {"video": self.row.video, "video_sha256": start_sha256(self.row.video)}
        return {
            "file": self.file,
            "prompt_index": self.prompt_index,
            "sample": self.sample,
            "prompt": self.row.prompt,
            "seed": self.seed,
            **extra,
        }


def wanted_videos(cfg: SampleConfig) -> list[VideoRequest]:
    """All videos of a run, in the order of its prompts. A prompt's n-th video has its own seed, or
    else the run's, plus n: it does not depend on the prompt's place in the list."""
    if bool(cfg.prompts) == bool(cfg.prompt_file):
        raise UserError("set either prompts or prompt_file")
    rows = [PromptRow(prompt) for prompt in cfg.prompts]
    if cfg.prompt_file:
        rows = read_prompt_file(Path(cfg.prompt_file), cfg.prompt_column)
    if len(rows) * cfg.samples > VIDEOS:
        raise UserError(
            f"samples is {cfg.samples} of {len(rows)} prompts, more than {VIDEOS:,} videos; share them out"
        )
    rows = [  # a row's own start or video counts, else the run's
        row if row.start or row.video else replace(row, start=cfg.start, video=cfg.video)
        for row in rows
    ]
    for name, path in ((name, getattr(row, name)) for row in rows for name in ("start", "video")):
        if path and not Path(path).is_file():
            raise UserError(f"{name} {path}: no such file; check the path")
    check_strength(cfg.strength, any(row.video for row in rows))
    check_past(cfg.history, any(row.then for row in rows))
    return [
        VideoRequest(
            f"{p:04d}-{n:02d}.mp4", row, p, n, (cfg.seed if row.seed is None else row.seed) + n
        )
        for p, row in enumerate(rows)
        for n in range(cfg.samples)
    ]


@dataclass
class VideoGenerator:
    """The parts that generate videos: student, sampler, VAE, text encoder, size and device."""

    cfg: SampleConfig
    student: Student
    sampler: Sampler
    vae: Vae
    text: TextEncoder
    shape: VideoShape
    device: torch.device
    decoder: TinyVae | None = None
    trained_sampler: SamplerConfig | None = None
    origin: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def negative(self) -> Conditioning:
        """The encoded negative prompt (1, L, E), computed once."""
        return self.text.encode([self.cfg.negative_prompt]).to(self.device)

    def start(self, videos: Sequence[VideoRequest]) -> Tensor | None:
        """Pixels (B, F, 3, H, W) in [0, 1] of the videos' start files, which are equally long
        within a batch."""
        if not videos[0].row.start:
            return None
        size = (self.shape.pixel_height, self.shape.pixel_width)
        paths = [Path(video.row.start) for video in videos]
        temporal, fps = self.shape.temporal, self.cfg.fps
        starts = {path: read_start(path, size, temporal, fps) for path in dict.fromkeys(paths)}
        pixels = torch.stack([starts[path] for path in paths])
        latent_frames = 1 + (pixels.shape[1] - 1) // self.shape.temporal
        check_start(latent_frames, self.student.chunk, self.shape, videos[0].row.start)
        return pixels

    def shape_of(self, video: VideoRequest) -> VideoShape:
        """The shape of what is made: with an input video, as many frames as it gives. UserError: it
        cannot be read, or is too short."""
        if not video.row.video:
            return self.shape
        size, where = (self.shape.pixel_height, self.shape.pixel_width), f"video {video.row.video}"
        count = count_cached(Path(video.row.video), size, self.cfg.fps, where)
        frames = input_frames(count, self.cfg.frames, self.shape, self.student.chunk, where)
        return replace(self.shape, frames=1 + (frames - 1) // self.shape.temporal)

    def known_frames(self, video: VideoRequest) -> int:
        """Latent frames that the start file gives, 0 without one. UserError: it cannot be read, or
        does not fit the clip."""
        if not video.row.start:
            return 0
        size = (self.shape.pixel_height, self.shape.pixel_width)
        count = count_start(Path(video.row.start), size, self.cfg.fps)
        frames = 1 + (count - 1) // self.shape.temporal
        check_start(frames, self.student.chunk, self.shape, video.row.start)
        return frames

    def remarks(self, videos: Sequence[VideoRequest]) -> list[str]:
        """What ``videos`` ask of the student that it was not trained for."""
        if not videos or self.trained_sampler is None:
            return []
        longest = max((self.shape_of(video) for video in videos), key=lambda shape: shape.frames)
        cfg = self.cfg
        num_held = cfg.window + cfg.sink
        return unusual(self.trained_sampler, cfg.guidance, longest, num_held, self.origin)

    def inputs(self, videos: Sequence[VideoRequest]) -> Iterator[ChunkInput] | None:
        """The batch's input video, the same for all, encoded as it is needed."""
        path = videos[0].row.video
        if not path:
            return None
        size = (self.shape.pixel_height, self.shape.pixel_width)
        pictures = read_pictures(Path(path), size, self.cfg.fps, f"video {path}")
        frames = (picture[None, None] for picture in pictures)
        return chunk_inputs(self.vae, frames, self.student.chunk, self.strength)

    @property
    def strength(self) -> float:
        """The share of noise that input videos begin with."""
        return choose_strength(self.cfg.strength, self.sampler)

    def input_settings(self) -> dict[str, float]:
        """For manifests of videos that are made from a video: the strength, the noise level that the
        sampler begins with, and the frames (0: as many as each file gives). UserError: the sampler
        has no step at so little noise."""
        begin = first_step(self.sampler, self.strength)
        return {
            "strength": self.strength,
            "noise": self.sampler.times[begin],
            "steps": self.sampler.steps - begin,
            "frames": self.cfg.frames,
        }

    def changes(self, videos: Sequence[VideoRequest]) -> dict[int, PromptChange]:
        """The batch's prompts from every pixel frame on where one of them changes."""
        prompts, changes = [video.row.prompt for video in videos], {}
        for frame in sorted({frame for video in videos for frame, _ in video.row.then}):
            for index, video in enumerate(videos):
                prompts[index] = dict(video.row.then).get(frame, prompts[index])
            cond = self.text.encode(prompts).to(self.device)
            changes[frame] = PromptChange(cond, self.cfg.history)
        return changes

    def frames(self, videos: Sequence[VideoRequest]) -> Iterator[Tensor]:
        """(B, n, 3, H, W) uint8, as they are made; the frames of ``start`` come first, as the VAE
        gives them back. ``videos`` share one start file or one input video, if they have any."""
        cond = self.text.encode([video.row.prompt for video in videos]).to(self.device)
        for pixels in generate(
            self.student,
            self.vae,
            cond,
            [video.seed for video in videos],
            self.shape_of(videos[0]),
            self.sampler,
            window=self.cfg.window,
            sink=self.cfg.sink,
            start=self.start(videos),
            changes=self.changes(videos),
            guidance=self.cfg.guidance,
            null=self.negative if self.cfg.guidance.on else None,
            decoder=self.decoder,
            inputs=self.inputs(videos),
        ):
            yield as_uint8(pixels)


def open_generator(
    cfg: SampleConfig,
    device: torch.device,
    path: Path | None = None,
    vae_device: torch.device | None = None,
) -> tuple[VideoGenerator, dict[str, object]]:
    """Load and check everything; also the settings that all videos of a manifest share. ``path``:
    the checkpoint, where it has been looked up. ``vae_device``: of the VAE and the tiny decoder,
    where it is another one."""
    path = path or Path(cfg.checkpoint)
    description, origin = describe_checkpoint(path, cfg.weights)
    trained_sampler = description.sampler
    sampler = choose_sampler(trained_sampler, cfg.sampler, cfg.checkpoint, force=cfg.force)
    base = base_of(description.base, cfg.base, path)
    student, _ = load_student(path, cfg.weights, cfg.blocks)
    check_window(cfg.window, cfg.sink, student.chunk)
    vae = load_vae(base, device=vae_device or device)
    decoder = load_decoder(cfg.decoder, device=vae.device, vae=vae) if cfg.decoder else None
    requested_size = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    shape = choose_shape(requested_size, origin, student, vae.geometry, cfg.checkpoint)
    text = open_text_encoder(base, cfg.text_cache, device=device, dtype=dtype_of(cfg.dtype))
    check_text_width(text, description, base)
    settings: dict[str, object] = {
        "checkpoint": cfg.checkpoint,
        "base": absolute(base),
        "weights": cfg.weights,
        "dtype": cfg.dtype,
        "blocks": None if cfg.blocks is None else asdict(cfg.blocks),
        "sampler": asdict(sampler) | {"times": list(sampler.times)},  # as JSON has it
        "guidance": asdict(cfg.guidance) | {"negative_prompt": cfg.negative_prompt}
        if cfg.guidance.on
        else None,
        "window": [cfg.window, cfg.sink] if cfg.window else None,
        "history": cfg.history,
        "size": [shape.pixel_frames, shape.pixel_height, shape.pixel_width],
        "fps": cfg.fps,
        "crf": cfg.crf,
        "seed": cfg.seed,
        "decoder": absolute(Path(cfg.decoder)) if cfg.decoder else "",
    }
    if cfg.decoder:
        settings["decoder_sha256"] = sha256_file(decoder_file(cfg.decoder))
    compile_steps(student.to(device, dtype_of(cfg.dtype)), cfg.compile, device)
    built = sampler.build()
    parts = VideoGenerator(
        cfg, student, built, vae, text, shape, device, decoder, trained_sampler, origin
    )
    return parts, settings


def check_text_width(text: TextEncoder, description: CheckpointConfig, base: Path) -> None:
    """UserError if the text encoder is not the one the student was trained with."""
    width = description.model.wan.text_dim
    if text.width != width:
        raise UserError(
            f"{base}: text states are {text.width} wide, the checkpoint takes {width}; set its base="
        )
