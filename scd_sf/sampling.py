"""From prompts to frames, as ``recipes/sample.py`` and ``scd sample`` make them (files: sample_folder.py).

Every video depends on its own seed alone (made from ``seed``, its prompt's number and its sample's number), not on the
batch, the ranks or what else is made. Frames are decoded as they are generated: memory does not grow with length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.checkpoint import MANIFEST, find
from scd_sf.data.prompt_files import PromptRow, read_prompt_file
from scd_sf.data.start import check_start, read_start
from scd_sf.diffusion.solvers import Sampler
from scd_sf.files import sha256_file
from scd_sf.metrics.frames import as_uint8
from scd_sf.models.blocks import BlocksConfig
from scd_sf.models.build import CheckpointConfig, SamplerConfig, Student, describe_checkpoint, load_student
from scd_sf.models.compile import CompileConfig, compile_steps
from scd_sf.models.export import dtype_of
from scd_sf.models.generator import CacheConfig, FrameStreamer
from scd_sf.models.guided import Guided, SampleGuidance
from scd_sf.models.text import TextEncoder, wan_negative
from scd_sf.models.text_cache import open_text_encoder
from scd_sf.models.vae import Vae, VaeStream, load_vae
from scd_sf.pipeline import choose_sampler, choose_shape
from scd_sf.rollout import fresh_noise, row_noise, stream_rollout
from scd_sf.types import Conditioning, UserError, VideoShape


@dataclass
class SampleConfig:
    """``prompts``, or ``prompt_file`` (txt, csv, jsonl: prompt_files.py). ``weights``: ema, model or best. ``base``:
    the Wan directory with VAE and text encoder (empty: the one the checkpoint was made from). Sizes of 0: as trained.
    ``sampler`` unset: the checkpoint's own; ``force`` allows another one on a distilled checkpoint. ``start``: an image
    or video that all videos continue, a video at ``fps``. ``window``, ``sink``: latent frames the history keeps (0:
    all), for videos longer than training. ``negative_prompt``: what text guidance leads away from ("wan": Wan 2.1's
    own). ``text_cache``: where encoded prompts are kept (empty: in the user's cache; "off": nowhere), see
    models/text_cache.py. ``dtype``: fp32, bf16 or fp16 for the student and the text encoder; the VAE computes in fp32.
    ``blocks``: how the causal baseline's blocks are run, such as the skip-layer schedule (unset: as the checkpoint
    says)."""

    checkpoint: str
    out: str
    prompts: list[str] = field(default_factory=list)
    prompt_file: str = ""
    prompt_column: str = "prompt"
    base: str = ""
    weights: str = "ema"
    samples: int = 1
    seed: int = 0
    frames: int = 0
    height: int = 0
    width: int = 0
    sampler: SamplerConfig | None = None
    force: bool = False
    guidance: SampleGuidance = field(default_factory=SampleGuidance)
    negative_prompt: str = ""
    text_cache: str = ""
    start: str = ""
    window: int = 0
    sink: int = 0
    dtype: str = "fp32"
    blocks: BlocksConfig | None = None
    compile: CompileConfig = field(default_factory=CompileConfig)
    batch: int = 4
    fps: int = 16
    crf: int = 16

    def __post_init__(self) -> None:
        if min(self.samples, self.batch, self.fps) < 1:
            raise UserError("samples, batch and fps must be at least 1")
        CacheConfig.sampling(self.window, self.sink, 1)  # refuses what makes no sense
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf is {self.crf}; it must be 0 (best) .. 51")
        self.negative_prompt = wan_negative(self.negative_prompt)
        dtype_of(self.dtype)


@cache
def start_sha256(path: str) -> str:
    """Of a start file, read once for all its videos."""
    return sha256_file(Path(path))


@dataclass(frozen=True)
class Video:
    """One video to make: ``file`` (posix, inside the output folder) of the ``sample``-th video of a prompt.

    ``title``: the prompt that a benchmark knows it by, where it is sampled from another wording.
    """

    file: str
    row: PromptRow
    prompt_index: int
    sample: int
    seed: int
    title: str = ""

    def record(self) -> dict[str, object]:
        """What the manifest says of it."""
        more: dict[str, object] = {"title": self.title} if self.title else {}
        if self.row.then:
            more["then"] = [list(change) for change in self.row.then]
        if self.row.start:
            more |= {"start": self.row.start, "start_sha256": start_sha256(self.row.start)}
        return {
            "file": self.file,
            "prompt_index": self.prompt_index,
            "sample": self.sample,
            "prompt": self.row.prompt,
            "seed": self.seed,
            **more,
        }


def sample_seed(seed: int, prompt_index: int, number: int) -> int:
    """63 bits that depend on these three alone."""
    digest = hashlib.blake2b(f"{seed}:{prompt_index}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def wanted_videos(cfg: SampleConfig) -> list[Video]:
    """All videos of a run, in the order of its prompts."""
    if bool(cfg.prompts) == bool(cfg.prompt_file):
        raise UserError("set either prompts or prompt_file")
    rows = [PromptRow(prompt) for prompt in cfg.prompts]
    if cfg.prompt_file:
        rows = read_prompt_file(Path(cfg.prompt_file), cfg.prompt_column)
    if cfg.start:
        rows = [PromptRow(row.prompt, row.then, row.start or cfg.start) for row in rows]
    for row in rows:
        if row.start and not Path(row.start).is_file():
            raise UserError(f"start {row.start}: no such file; check the path")
    return [
        Video(f"{p:04d}-{n:02d}.mp4", row, p, n, sample_seed(cfg.seed, p, n))
        for p, row in enumerate(rows)
        for n in range(cfg.samples)
    ]


@dataclass
class Studio:
    """What makes videos: the student, how it is sampled, the decoder, the text encoder, and the size."""

    cfg: SampleConfig
    student: Student
    sampler: Sampler
    vae: Vae
    text: TextEncoder
    shape: VideoShape
    device: torch.device

    @cached_property
    def negative(self) -> Conditioning:
        """The negative prompt, encoded once."""
        return self.text.encode([self.cfg.negative_prompt]).to(self.device)

    def generator(self, seeds: Sequence[int]) -> FrameStreamer:
        if not self.cfg.guidance.on:
            return self.student
        return Guided(self.student, self.cfg.guidance, self.negative, row_noise([seed ^ 1 for seed in seeds]))

    def history(self, videos: Sequence[Video]) -> Tensor | None:
        """Latents (B, F', C, H, W) of the videos' start files, which are equally long within a batch."""
        if not videos[0].row.start:
            return None
        size = (self.shape.pixel_height, self.shape.pixel_width)
        starts = [Path(video.row.start) for video in videos]
        pixels = torch.stack([read_start(start, size, self.shape.temporal, self.cfg.fps) for start in starts])
        latents = self.vae.encode(pixels * 2 - 1).to(self.device)
        check_start(latents.shape[1], self.student.chunk, self.shape, videos[0].row.start)
        return latents

    def prompts(self, videos: Sequence[Video], known: int) -> dict[int, Conditioning]:
        """The batch's prompts at every chunk where one of them changes, counted after ``known`` latent frames."""
        now, found = [video.row.prompt for video in videos], {}
        changes = sorted({frame for video in videos for frame, _ in video.row.then})
        for pixel_frame in changes:
            latent = -(-(pixel_frame - 1) // self.shape.temporal) + (1 if pixel_frame > 1 else 0)
            for index, video in enumerate(videos):
                now[index] = dict(video.row.then).get(pixel_frame, now[index])
            found[max(0, -(-(latent - known) // self.student.chunk))] = self.text.encode(now).to(self.device)
        return found

    @torch.no_grad()
    def frames(self, videos: Sequence[Video]) -> Iterator[Tensor]:
        """(B, n, 3, H, W) uint8, as they are made; the frames of ``start`` come first, as the VAE gives them back."""
        shape, seeds = self.shape, [video.seed for video in videos]
        cond = self.text.encode([video.row.prompt for video in videos]).to(self.device)
        like, decoder, history = row_noise(seeds), VaeStream(self.vae), self.history(videos)
        known = 0 if history is None else history.shape[1]

        def on_device(x: Tensor) -> Tensor:
            return like(x.to(self.device))

        size = (shape.channels, shape.height, shape.width)
        noise = fresh_noise(size, len(videos), self.student.chunk, shape.frames - known, on_device)
        if history is not None:
            yield as_uint8((decoder.push(history) + 1) / 2)
        for latents in stream_rollout(
            self.generator(seeds),
            noise,
            cond,
            self.sampler,
            on_device,
            cache=CacheConfig.sampling(self.cfg.window, self.cfg.sink, shape.frames),
            history=history,
            prompts=self.prompts(videos, known),
        ):
            if not latents.isfinite().all():
                raise UserError("samples are not finite; the weights are broken or the sampler is not theirs")
            yield as_uint8((decoder.push(latents) + 1) / 2)


def open_studio(cfg: SampleConfig, device: torch.device) -> tuple[Studio, dict[str, object]]:
    """Load and check everything; also the settings that all videos of a manifest share."""
    path = Path(cfg.checkpoint)
    description, origin = describe_checkpoint(path)
    own = description.sampler
    sampler = choose_sampler(own, cfg.sampler, cfg.checkpoint, force=cfg.force)
    student, _ = load_student(path, cfg.weights, cfg.blocks)
    if not (cfg.base or description.base):
        raise UserError(f"{path}: does not name its Wan directory; set base=")
    base = Path(cfg.base or description.base)
    vae = load_vae(base, device=device)
    asked = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    shape = choose_shape(asked, origin, student, vae.geometry, cfg.checkpoint)
    text = open_text_encoder(base, cfg.text_cache, device=device, dtype=dtype_of(cfg.dtype))
    check_text_width(text, description, base)
    settings: dict[str, object] = {
        "checkpoint": str(path),
        "checkpoint_sha256": sha256_file(path if path.is_file() else find(path) / MANIFEST),
        "weights": cfg.weights,
        "dtype": cfg.dtype,
        "blocks": None if cfg.blocks is None else asdict(cfg.blocks),
        "sampler": asdict(cfg.sampler or own),
        "guidance": asdict(cfg.guidance) | {"negative_prompt": cfg.negative_prompt} if cfg.guidance.on else None,
        "window": [cfg.window, cfg.sink] if cfg.window else None,
        "size": [shape.pixel_frames, shape.pixel_height, shape.pixel_width],
        "fps": cfg.fps,
        "crf": cfg.crf,
        "seed": cfg.seed,
    }
    compile_steps(student.to(device, dtype_of(cfg.dtype)), cfg.compile, device)
    return Studio(cfg, student, sampler, vae, text, shape, device), settings


def check_text_width(text: TextEncoder, description: CheckpointConfig, base: Path) -> None:
    """UserError if the text encoder is not the one the student was trained with."""
    width = description.model.wan.text_dim
    if text.width != width:
        raise UserError(f"{base}: text states are {text.width} wide, the checkpoint takes {width}; set its base=")
