"""Videos from a student checkpoint and text prompts: mp4 files and a manifest.

    python recipes/sample.py checkpoint=runs/demo/stage3-scd base=assets/wan_doom \\
        prompts='["the camera turns left in a green hall"]' out=runs/samples

The sampler and the size come from the checkpoint. Every video has its own seed (from ``seed``, its prompt's number and
its sample's number), so it does not depend on the batch or on what else is made. The same command skips what is there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from scd_sf.checkpoint import MANIFEST, find, read_provenance
from scd_sf.config import from_yaml
from scd_sf.data.clips import write_video
from scd_sf.data.manifest import read_json, sha256_file, write_json
from scd_sf.diffusion.solvers import build_sampler
from scd_sf.metrics.frames import as_uint8
from scd_sf.models.build import CheckpointConfig, SamplerConfig, Student, load_student
from scd_sf.models.generator import check_chunks
from scd_sf.models.text import load_text_encoder
from scd_sf.models.vae import Vae, load_vae
from scd_sf.rollout import sample
from scd_sf.train.recipe import check_shape, from_command_line
from scd_sf.types import Conditioning, UserError, VideoShape, exit_on_user_error

INDEX = "manifest.json"


@dataclass
class SampleConfig:
    """``prompts``, or ``prompt_file`` with one per line. ``weights``: ema, model or best. ``base``: the Wan directory
    with VAE and text encoder (empty: the one the checkpoint was made from). Sizes of 0: as trained. ``sampler`` unset:
    the checkpoint's own; ``force`` allows another one on a distilled checkpoint."""

    checkpoint: str
    out: str
    prompts: list[str] = field(default_factory=list)
    prompt_file: str = ""
    base: str = ""
    weights: str = "ema"
    samples: int = 1
    seed: int = 0
    frames: int = 0
    height: int = 0
    width: int = 0
    sampler: SamplerConfig | None = None
    force: bool = False
    batch: int = 4
    fps: int = 16

    def __post_init__(self) -> None:
        if min(self.samples, self.batch, self.fps) < 1:
            raise UserError("samples, batch and fps must be at least 1")
        if bool(self.prompts) == bool(self.prompt_file):
            raise UserError("set either prompts or prompt_file")


@dataclass(frozen=True)
class Video:
    """One video to make."""

    file: str
    prompt_index: int
    sample: int
    prompt: str
    seed: int


def sample_seed(seed: int, prompt_index: int, number: int) -> int:
    """63 bits that depend on these three alone."""
    digest = hashlib.blake2b(f"{seed}:{prompt_index}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_prompts(cfg: SampleConfig) -> list[str]:
    if not cfg.prompt_file:
        prompts = cfg.prompts
    else:
        try:
            lines = Path(cfg.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt_file {cfg.prompt_file}: cannot be read ({error}); check the path") from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file {cfg.prompt_file}: no prompt in it; write one per line")
    return prompts


def choose_sampler(own: SamplerConfig, cfg: SampleConfig, path: Path) -> SamplerConfig:
    """The checkpoint's, or the one asked for. A distilled student gives noise with a sampler it was not trained for."""
    if cfg.sampler is None or cfg.sampler == own:
        return own
    if own.name == "renoise" and not cfg.force:
        raise UserError(
            f"{path}: distilled for sampler {asdict(own)}, not for {asdict(cfg.sampler)}; leave sampler unset, or "
            "add force=true"
        )
    return cfg.sampler


def choose_size(cfg: SampleConfig, path: Path, student: Student, description: CheckpointConfig, vae: Vae) -> VideoShape:
    """Sizes asked for, else those of the training videos; checked against VAE and model."""
    trained = read_provenance(path).get("video")
    known = trained if isinstance(trained, dict) else {}
    asked = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    size = {name: value or known.get(name, 0) for name, value in asked.items()}
    missing = [name for name, value in size.items() if not value]
    if missing:
        raise UserError(f"{path}: does not say what it was trained on; set {', '.join(f'{m}=' for m in missing)}")
    shape = vae.geometry.shape(size["frames"], size["height"], size["width"])
    wan = description.model.wan
    check_shape(shape, f"{path} with this VAE", wan.in_channels, (wan.patch_height, wan.patch_width), student.chunk)
    check_chunks(shape.frames, student.chunk)
    return shape


def encode(base: Path, prompts: Sequence[str], width: int) -> Conditioning:
    encoder = load_text_encoder(base)
    if encoder.width != width:
        raise UserError(f"{base}: text states are {encoder.width} wide, the checkpoint takes {width}; set its base=")
    return encoder.encode(prompts)


def open_index(out: Path, settings: dict[str, object]) -> dict[str, object]:
    """Finished videos by file. Raises UserError where another run's, or somebody's, videos would be overwritten."""
    file = out / INDEX
    if file.is_file():
        saved = read_json(file, "use another out=")
        old, videos = saved.get("settings"), saved.get("videos")
        if not isinstance(old, dict) or not isinstance(videos, dict):
            raise UserError(f"{file}: not a sample manifest; use another out=")
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{file}: {name} is {old.get(name)!r} there but {settings[name]!r} now; nothing is overwritten: "
                "use another out="
            )
        return videos
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out}: holds files but no {INDEX}; nothing is overwritten: use another out=")
        write_json(file, {"settings": settings, "videos": {}})
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); use another out=") from error
    return {}


def waiting(out: Path, videos: Sequence[Video], done: dict[str, object]) -> list[Video]:
    """Videos that are not there whole. Raises UserError for a finished one of another prompt."""
    left = []
    for video in videos:
        entry = done.get(video.file)
        if not isinstance(entry, dict):
            left.append(video)
        elif entry["prompt"] != video.prompt:
            raise UserError(f"{out / video.file}: made for prompt {entry['prompt']!r}; use another out=")
        elif not (out / video.file).is_file() or sha256_file(out / video.file) != entry["sha256"]:
            left.append(video)
    return left


def main() -> None:
    cfg = from_command_line(SampleConfig, __doc__ or "")
    prompts, path, out = read_prompts(cfg), find(Path(cfg.checkpoint)), Path(cfg.out)
    description = from_yaml(CheckpointConfig, path / "config.yaml")
    chosen = choose_sampler(description.sampler, cfg, path)
    sampler = build_sampler(chosen.name, chosen.steps, chosen.shift)
    student, _ = load_student(path, cfg.weights)
    if not (cfg.base or description.base):
        raise UserError(f"{path}: does not name its Wan directory; set base=")
    base = Path(cfg.base or description.base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(base, device=device)
    shape = choose_size(cfg, path, student, description, vae)
    text = encode(base, prompts, description.model.wan.text_dim)
    settings = {
        "checkpoint": str(path),
        "checkpoint_sha256": sha256_file(path / MANIFEST),
        "weights": cfg.weights,
        "sampler": asdict(chosen),
        "size": [shape.pixel_frames, shape.pixel_height, shape.pixel_width],
        "fps": cfg.fps,
        "seed": cfg.seed,
    }
    done = open_index(out, settings)
    videos = [
        Video(f"{p:04d}-{n:02d}.mp4", p, n, prompt, sample_seed(cfg.seed, p, n))
        for p, prompt in enumerate(prompts)
        for n in range(cfg.samples)
    ]
    todo = waiting(out, videos, done)
    print(f"{out}: {len(videos)} videos, {len(videos) - len(todo)} finished before", flush=True)
    student.to(device)
    started = time.monotonic()
    for first in range(0, len(todo), cfg.batch):
        part = todo[first : first + cfg.batch]
        cond = Conditioning(text.text_BLE[[video.prompt_index for video in part]]).to(device)
        size = (shape.frames, shape.channels, shape.height, shape.width)
        latents = sample(student, cond, size, sampler, [video.seed for video in part], device)
        if not latents.isfinite().all():
            raise UserError(f"{path}: samples are not finite; the weights are broken or the sampler is not theirs")
        for video, pixels in zip(part, vae.decode(latents).cpu(), strict=True):
            write_video(out / video.file, as_uint8((pixels + 1) / 2), cfg.fps)
            done[video.file] = {**asdict(video), "sha256": sha256_file(out / video.file)}
        write_json(out / INDEX, {"settings": settings, "videos": done})
        made = first + len(part)
        seconds = (time.monotonic() - started) / made
        left = round(seconds * (len(todo) - made))
        print(f"{made}/{len(todo)} videos  {seconds:.3g} s/video  left {left // 60}:{left % 60:02d}", flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
