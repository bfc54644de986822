"""The plan of ``data_prep/generate_clips.py``: its configuration, the clips' ids, and the units of
work.

A clip's id is a hash of all that decides its latents (:func:`clip_id`), and its noise comes from a
CPU generator seeded by the id. So a clip does not depend on ranks, hosts or restarts, and whoever
makes it writes the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scd_sf.data.clip_index import Common
from scd_sf.data.prompt_files import PromptRow, read_prompt_file
from scd_sf.diffusion.guidance import GuidanceConfig
from scd_sf.diffusion.samplers import build_sampler
from scd_sf.files import Json, hash_json, identity, sha256_file, sha256_folder
from scd_sf.models.build import SamplerConfig
from scd_sf.models.wan.text import encoder_parts, text_config, wan_negative
from scd_sf.models.wan.vae import vae_source
from scd_sf.models.wan.weights import WanFiles
from scd_sf.tensor_files import dtype_of
from scd_sf.train.base import TRAINING, EngineConfig
from scd_sf.train.run import YEAR_MINUTES
from scd_sf.types import UserError, check_within

# fields of a clip's shape that its id hashes even at their defaults
SHAPE = ("frames", "channels", "height", "width", "temporal", "spatial")
CONTENTS = ("*.safetensors", "*.json", "*.model", "*.pth")  # weights, configuration, tokenizer


@dataclass
class ClusterConfig:
    """Only for ``launcher=ray``."""

    address: str = "auto"
    """Address of a running cluster; auto: this machine's; empty: start one here."""
    workers: int = 0
    """At most so many; 0: as many as the cluster's GPUs, or CPUs, allow."""
    gpus: float = 1.0
    """GPUs of a worker."""
    cpus: float = 1.0
    """CPUs of a worker."""
    retries: int = 5
    """How often a clip is tried again when its worker dies."""

    def __post_init__(self) -> None:
        if (
            self.workers < 0
            or self.retries < 0
            or self.gpus < 0
            or self.cpus < 0
            or not self.gpus + self.cpus
        ):
            raise UserError(
                "cluster: workers, retries, gpus and cpus must be at least 0, one of gpus and cpus above it"
            )


@dataclass
class GenerateConfig:
    """Clips of a teacher."""

    model: str
    """Directory of the teacher, with VAE and text encoder, or its name on the Hugging Face hub, with
    or without @REVISION."""
    out: str
    """Folder of the clips."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; or give ``prompt_file``."""
    prompt_file: str = ""
    """A txt, csv or jsonl file, or the folder of a filter or extender; a column uuid is kept."""
    prompt_column: str = "prompt"
    """Column or key of the prompts in a csv or jsonl file."""
    val: float = 0.0
    """Clips for validation: below 1 the share of the prompts, from 1 on their number, chosen by the
    hash of the prompt; then ``out`` gets train and val. 0: all clips lie in ``out`` itself."""
    samples: int = 1
    """Clips per prompt."""
    seed: int = 0
    """Clips of a prompt have seed, seed + 1, ...; a row's own seed counts first."""
    frames: int = 81
    """Video frames: 1 + 4 k."""
    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("unipc", 50, 5.0))
    """Sampler and steps."""
    guidance: GuidanceConfig = field(default_factory=lambda: GuidanceConfig(5.0))
    """Classifier-free guidance."""
    negative_prompt: str = "wan"
    """What guidance leads away from; wan: Wan 2.1's own."""
    text_dtype: str = "bf16"
    """Type that the text encoder computes in: bf16, fp16 or fp32."""
    text_cache: str = ""
    """Folder that keeps encoded prompts; empty: text-cache in ``out``; on several hosts one that
    all see."""
    store: str = "bf16"
    """Type of the latents on disk: bf16, fp16 or fp32."""
    batch: int = 1
    """Clips that go through the teacher together; a group is always computed whole, so that a clip
    does not depend on what was finished before."""
    videos: bool = True
    """Also write an mp4 of each clip."""
    fps: int = 16
    """Frames per second of the mp4 files."""
    crf: int = 18
    """Quality of the mp4 files: 0 (best) .. 51."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(dtype="bf16"))
    """Where the teacher lies: backend deepspeed partitions it over the ranks (ZeRO-3), with
    ``offload`` on the CPU; torch: a whole one per rank."""
    launcher: Literal["ranks", "ray"] = "ranks"
    """ranks (deepspeed, torchrun, plain python) or ray."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster."""
    timeout_minutes: float = 120.0
    """How long one rank may keep the others waiting before the job ends."""

    def __post_init__(self) -> None:
        check_within(
            self,
            {"samples": (1, 2**22), "batch": (1, 2**22), "fps": (1, 1000), "seed": (0, 2**63 - 1)},
        )
        check_within(
            self,
            {
                "frames": (1, 10**6),
                "height": (1, 2**15),
                "width": (1, 2**15),
                "timeout_minutes": (0.01, YEAR_MINUTES),
            },
        )
        plain = EngineConfig()
        for name in TRAINING:
            if getattr(self.engine, name) != getattr(plain, name):
                raise UserError(f"engine.{name} is set, but the teacher is not trained: remove it")
        if bool(self.prompts) == bool(self.prompt_file):
            raise UserError("set either prompts or prompt_file")
        if self.val < 0 or (self.val > 1 and self.val % 1):
            raise UserError(
                f"val is {self.val:g}; give a share of the prompts below 1, or a whole number of them"
            )
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf is {self.crf}; it must be 0 (best) .. 51")
        dtype_of(self.store, "store")
        self.negative_prompt = wan_negative(self.negative_prompt)
        dtype_of(self.text_dtype, "text_dtype")
        if self.launcher != "ray" and self.cluster != ClusterConfig():
            raise UserError(
                f"cluster is for launcher=ray, and launcher is {self.launcher}: leave one of them out"
            )
        sampler = build_sampler(self.sampler.name, self.sampler.steps, self.sampler.shift)
        if sampler.name == "renoise":
            raise UserError(
                f"sampler.name is '{sampler.name}', which is for distilled students; use unipc or euler"
            )

    @property
    def roots(self) -> list[Path]:
        """The folders of the clips: ``out``, or ``out/train`` and ``out/val``."""
        return [Path(self.out) / name for name in (("train", "val") if self.val else ("",))]

    @property
    def cache_folder(self) -> str:
        return self.text_cache or str(Path(self.out) / "text-cache")


@dataclass(frozen=True)
class Spec:
    """One clip to make. ``folder``: its folder in ``out``; "" where all lie in ``out`` itself."""

    id: str
    prompt: str
    uuid: str
    seed: int
    folder: str = ""

    @property
    def noise_seed(self) -> int:
        """Seed of the CPU generator of its noise: 63 bits of the id."""
        return int(self.id[:16], 16) >> 1


Unit = tuple[Spec, ...]


def settings_of(cfg: GenerateConfig, files: WanFiles) -> Json:
    """All that clips of one folder share (reads and hashes the model's files)."""
    config = text_config(cfg.model)
    weights, tokens = encoder_parts(config)
    text = {
        "settings": config.settings,
        "dtype": cfg.text_dtype,
        "files": _contents(weights) | _contents(tokens),
    }
    vae = vae_source(Path(cfg.model))
    return {
        "model_sha": hash_json(_contents(files.path)),
        "text_sha": hash_json(text),
        "vae_sha": sha256_file(vae) if vae.is_file() else sha256_folder(vae),
        "negative_prompt": cfg.negative_prompt,
        "sampler": cfg.sampler.name,
        "steps": cfg.sampler.steps,
        "shift": cfg.sampler.shift,
        "cfg": cfg.guidance.w,
        "dtype": cfg.engine.dtype,
        "batch": cfg.batch,
        "videos": [cfg.fps, cfg.crf] if cfg.videos else [],
        **({"val": cfg.val} if cfg.val else {}),
    }


def _contents(source: Path) -> dict[str, str]:
    """Name -> sha256 of a file, or of the weights and configurations directly in a folder."""
    files = (
        {source} if source.is_file() else {file for part in CONTENTS for file in source.glob(part)}
    )
    return {file.name: sha256_file(file) for file in sorted(files)}


def clip_id(prompt: str, seed: int, common: Common) -> str:
    """32 hexadecimal digits of blake2b over all that decides a clip's latents."""
    names = (
        "negative_prompt",
        "model_sha",
        "text_sha",
        "sampler",
        "steps",
        "shift",
        "cfg",
        "dtype",
    )
    row = {name: common.settings[name] for name in names}
    row |= {
        "prompt": prompt,
        "seed": seed,
        "shape": identity(common.shape, SHAPE),
        "store": common.dtype,
    }
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def wanted_clips(cfg: GenerateConfig, common: Common) -> list[Spec]:
    """Every clip of a run once, in id order. UserError for prompts that need more than a
    teacher."""
    rows = [PromptRow(prompt.strip()) for prompt in cfg.prompts]
    if cfg.prompt_file:
        rows = read_prompt_file(Path(cfg.prompt_file), cfg.prompt_column)
    folders = _splits([row.prompt for row in rows], cfg.val)
    specs: dict[str, Spec] = {}
    for number, row in enumerate(rows, 1):
        if problems := [name for name in ("then", "start", "video") if getattr(row, name)] or (
            [] if row.prompt else ["no prompt"]
        ):
            place = f"{cfg.prompt_file}: row" if cfg.prompt_file else "prompts: number"
            raise UserError(
                f"{place} {number} ({row.prompt[:60]!r}) has {' and '.join(problems)}; a teacher's clip takes a prompt "
                "alone: correct it"
            )
        first_seed = cfg.seed if row.seed is None else row.seed
        for seed in range(first_seed, first_seed + cfg.samples):
            spec = Spec(
                clip_id(row.prompt, seed, common),
                row.prompt,
                row.uuid,
                seed,
                folders.get(row.prompt, ""),
            )
            specs.setdefault(spec.id, spec)
    return [specs[key] for key in sorted(specs)]


def _splits(prompts: Sequence[str], val: float) -> dict[str, str]:
    """Prompt -> train or val; empty for ``val`` 0. A share takes the prompts whose hash is below it,
    so that prompts that come later do not change the split; a number takes the lowest hashes.

    UserError: one of the two would be empty."""
    if not val:
        return {}
    hashes = {prompt: hash_json(prompt) for prompt in prompts}
    if val < 1:
        kept = {prompt for prompt, digest in hashes.items() if int(digest[:13], 16) < val * 16**13}
    else:
        kept = set(sorted(hashes, key=hashes.__getitem__)[: round(val)])
    if not 0 < len(kept) < len(hashes):
        raise UserError(
            f"val={val:g} takes {len(kept)} of {len(hashes)} prompts; give a number that leaves some for both"
        )
    return {prompt: "val" if prompt in kept else "train" for prompt in hashes}


def units_of(specs: Sequence[Spec], batch: int) -> list[Unit]:
    """Groups of ``batch`` clips, by id: the smallest parts of the work, the same for every number
    of ranks."""
    return [tuple(specs[start : start + batch]) for start in range(0, len(specs), batch)]
