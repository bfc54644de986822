"""One worker: a rank of a launcher or a Ray actor. It encodes prompts into the cache and makes
units of clips.

Everything it writes is content-addressed and atomic, the latent file last, so workers need not know
of each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from scd_sf import __version__
from scd_sf.data.clip_files import VIDEO, About, clip_path, clip_paths, sweep_clips, write_clip
from scd_sf.data.clip_index import JOB, Common, fault_of, open_job, read_folder_job
from scd_sf.data.clips import write_video
from scd_sf.data.prompts import index_clips, write_fixed_prompts
from scd_sf.diffusion.guidance import guided
from scd_sf.diffusion.samplers import build_sampler
from scd_sf.distributed import Ranks
from scd_sf.files import hash_json, locked, require_own_folder, sha256_file, write_json, write_jsonl
from scd_sf.generation.bidirectional import sample_bidirectional
from scd_sf.generation.generate import as_uint8
from scd_sf.models.wan.text import pad_states
from scd_sf.models.wan.text_cache import CachedTextEncoder
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.vae import Vae, load_vae
from scd_sf.models.wan.weights import open_wan
from scd_sf.tensor_files import dtype_name, dtype_of
from scd_sf.tools.generate.plan import GenerateConfig, Spec, Unit, settings_of, wanted_clips
from scd_sf.train.checks import check_shape
from scd_sf.train.engine import frozen_engine
from scd_sf.types import Conditioning, UserError

WANTED = "wanted.jsonl"
SPLITS = "splits.json"  # in a folder whose clips lie in train and val
PROMPTS_AT_ONCE = 64  # states held in memory while encoding
MAX_PROBLEMS = 10  # clips of one rank or cluster that may fail


def prepare(cfg: GenerateConfig, locks: ExitStack) -> list[Spec]:
    """Check everything, begin the folder (``job.json``, ``wanted.jsonl``) and return the clips to
    make. One process calls it, and holds the folder until ``locks`` is closed.

    UserError for a model, a size or prompts that do not fit, for a folder of other clips, for too
    small a disk.
    """
    out, model = Path(cfg.out), Path(cfg.model)
    files = open_wan(model)
    geometry = load_vae(model).geometry
    shape = geometry.shape(cfg.frames, cfg.height, cfg.width)
    check_shape(
        shape,
        cfg.model,
        files.config.in_channels,
        (files.config.patch_height, files.config.patch_width),
        1,
    )
    text = CachedTextEncoder(cfg.model, Path(cfg.cache_folder), dtype=dtype_of(cfg.text_dtype))
    if text.width != files.config.text_dim:
        raise UserError(
            f"{cfg.model}: text states are {text.width} wide, the teacher takes {files.config.text_dim}"
        )
    common = Common(
        shape, dtype_name(dtype_of(cfg.store)), text.width, text.max_length, settings_of(cfg, files)
    )
    specs = wanted_clips(cfg, common)
    _check_disk(out, common, specs)
    require_own_folder(out, [SPLITS if cfg.val else JOB])
    locks.enter_context(locked(out, "generate_clips"))
    if cfg.val and not (out / SPLITS).is_file():  # before train and val, so that a kill leaves it
        write_json(out / SPLITS, {"folders": [root.name for root in cfg.roots], "val": cfg.val})
    for root in cfg.roots:
        open_job(root, common)
    _check_splits(cfg, specs)
    for root in cfg.roots:
        rows = [asdict(spec) for spec in specs if out / spec.folder == root]
        write_jsonl(
            root / WANTED, [{k: v for k, v in row.items() if k != "folder"} for row in rows]
        )
    return specs


def _check_splits(cfg: GenerateConfig, specs: Sequence[Spec]) -> None:
    """UserError where a clip was made for the other split, by other prompts beside it."""
    for spec in specs:
        for root in cfg.roots:
            if root != Path(cfg.out) / spec.folder and clip_path(root, spec.id).is_file():
                raise UserError(
                    f"{clip_path(root, spec.id)}: this prompt is in {root.name} and belongs to {spec.folder} among the "
                    "present prompts; give val as a share, which does not depend on them, in another out="
                )


def _check_disk(out: Path, common: Common, specs: Sequence[Spec]) -> None:
    existing_folder = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    clip_count = sum(not clip_path(out / spec.folder, spec.id).is_file() for spec in specs)
    needed_bytes = (
        clip_count * common.torch_dtype.itemsize * torch.Size(common.shape.latent(1)).numel()
    )
    if needed_bytes > (free := shutil.disk_usage(existing_folder).free):
        raise UserError(
            f"out={out}: {clip_count} clips need {needed_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there"
        )


def missing(root: Path, common: Common, unit: Unit) -> list[Spec]:
    """The clips of a unit that do not exist or are damaged (names and headers are read, no
    data)."""
    paths = [(spec, clip_path(root / spec.folder, spec.id)) for spec in unit]
    return [spec for spec, path in paths if not path.is_file() or fault_of(path, common)]


class Maker:
    """A worker on the folder ``cfg.out``, which :func:`prepare` has begun. Weights are loaded when
    they are first needed."""

    def __init__(self, cfg: GenerateConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.root = Path(cfg.out)
        self.common = read_folder_job(cfg.roots[0])
        self.sampler = build_sampler(cfg.sampler.name, cfg.sampler.steps, cfg.sampler.shift)
        self.text = self._encoder()

    def _encoder(self) -> CachedTextEncoder:
        cfg = self.cfg
        folder = Path(cfg.cache_folder)
        return CachedTextEncoder(
            cfg.model, folder, device=self.ranks.device, dtype=dtype_of(cfg.text_dtype)
        )

    def tidy(self) -> None:
        """Remove temporary files of killed processes. One worker per machine calls it."""
        for root in self.cfg.roots:
            sweep_clips(root)

    def fixed_prompts(self) -> None:
        """Write the files of the empty and the negative prompt. One worker calls it, before any
        clip is made."""
        for root in self.cfg.roots:
            write_fixed_prompts(
                root, self.text.states, self.cfg.negative_prompt, self.common.torch_dtype
            )

    def encode(self, prompts: Sequence[str]) -> int:
        """Encode prompts into the cache and return their number."""
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            self.text.states(prompts[start : start + PROMPTS_AT_ONCE])
        return len(prompts)

    def make(self, unit: Unit, *, write: bool = True) -> list[str]:
        """Make a unit and write its missing clips. Returns one line for each clip that failed.

        ``write=False``: only compute, for a rank that has nothing left while others need it in
        ZeRO-3's gathers.
        """
        latents = self._sample(unit)
        problems, missing_specs = [], missing(self.root, self.common, unit) if write else []
        for spec, clip in zip(unit, latents, strict=True):
            if spec not in missing_specs:
                continue
            if not clip.isfinite().all():
                problems.append(
                    f"clip {spec.id} ({spec.prompt[:60]!r}): not finite; use engine.dtype=fp32 or other weights"
                )
                continue
            self._write(spec, clip)
        return problems

    def _sample(self, unit: Unit) -> Tensor:
        states = self.text.states([spec.prompt for spec in unit])
        cond = Conditioning(pad_states(states, self.common.max_length)).to(self.ranks.device)
        denoiser = guided(self.teacher, self.negative, self.cfg.guidance.w)
        shape, seeds = self.common.shape.latent(1)[1:], [spec.noise_seed for spec in unit]
        latents = sample_bidirectional(
            denoiser, cond, shape, self.sampler, seeds, self.ranks.device
        )
        return latents.to(self.common.torch_dtype).cpu()

    def _write(self, spec: Spec, latents: Tensor) -> None:
        """Write a clip, its video first. So a latent file means that the clip is complete."""
        cfg, settings, shape = self.cfg, self.common.settings, self.common.shape
        path = clip_path(self.root / spec.folder, spec.id)
        path.parent.mkdir(exist_ok=True)
        digest = self._write_video(path.with_suffix(VIDEO), latents) if cfg.videos else ""
        about = About(
            id=spec.id,
            prompt=spec.prompt,
            video_sha256=digest,
            uuid=spec.uuid,
            seed=spec.seed,
            sampler=cfg.sampler.name,
            steps=cfg.sampler.steps,
            shift=cfg.sampler.shift,
            cfg=cfg.guidance.w,
            neg_sha=hash_json(cfg.negative_prompt),
            model_sha=str(settings["model_sha"]),
            text_sha=str(settings["text_sha"]),
            vae_sha=str(settings["vae_sha"]),
            fps=cfg.fps,
            frames=shape.pixel_frames,
            size=f"{shape.pixel_width}x{shape.pixel_height}",
            toolkit=__version__,
        )
        states = self.text.states([spec.prompt])[0].to(self.common.torch_dtype)
        write_clip(self.root / spec.folder, latents, states, about)

    def _write_video(self, path: Path, latents: Tensor) -> str:
        """Write the video, decoded from the latents as stored, and return the mp4's sha256."""
        frames = as_uint8((self.vae.decode(latents.unsqueeze(0).float())[0] + 1) / 2)
        write_video(path, frames.cpu(), self.cfg.fps, crf=self.cfg.crf)
        return sha256_file(path)

    @cached_property
    def teacher(self) -> nn.Module:
        """The frozen teacher. The text encoder's memory is freed before it is built."""
        self.text = self._encoder()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        files = open_wan(Path(self.cfg.model))
        weights = {name: tensor.read for name, tensor in files.tensors.items()}
        return frozen_engine(lambda: Wan(files.config), weights, self.cfg.engine, self.ranks)

    @cached_property
    def vae(self) -> Vae:
        return load_vae(self.cfg.model, device=self.ranks.device)

    @cached_property
    def negative(self) -> Conditioning:
        return self.text.encode([self.cfg.negative_prompt]).to(self.ranks.device)


def check_problems(problems: Sequence[str]) -> None:
    """UserError where more than :data:`MAX_PROBLEMS` clips could not be made."""
    if len(problems) > MAX_PROBLEMS:
        raise UserError(f"{len(problems)} clips could not be made; the last: {problems[-1]}")


def finish(cfg: GenerateConfig, specs: Sequence[Spec], problems: Sequence[str]) -> str:
    """Write the index of the folder's clips and return one line about it. UserError where clips are
    missing."""
    root = Path(cfg.out)
    missing_ids = [
        spec.id for spec in specs if not clip_path(root / spec.folder, spec.id).is_file()
    ]
    if len(missing_ids) == len(specs):
        raise UserError(
            f"{root}: no clip was made; {problems[0] if problems else 'see the messages above'}"
        )
    count = sum(index_clips(folder) for folder in cfg.roots if clip_paths(folder))
    if missing_ids:
        reason = f"; the first: {problems[0]}" if problems else "; run the same command again"
        raise UserError(
            f"{root}: {len(missing_ids)} of {len(specs)} clips are missing (first {missing_ids[0]}){reason}"
        )
    hint = f"; stage 2 reads data={root / 'train'} val={root / 'val'}" if cfg.val else ""
    return f"{root}: all {len(specs)} clips of this run are there, {count} in the index{hint}"
