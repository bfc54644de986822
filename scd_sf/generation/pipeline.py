"""A student as a diffusers pipeline: ``pipe(prompt)`` for whole clips, ``pipe.stream(prompt)`` for
frames as they come.

    pipe = SCDWanPipeline.from_pretrained("exported")  # `scd export RUN exported --layout pipeline`
    frames = pipe("a red car in the rain", seed=1).frames[0]  # (F, 3, H, W) in [0, 1]
    for frames in pipe.stream("a red car in the rain"): ...

The directory has diffusers' layout (model_index.json, vae/, text_encoder/ and tokenizer/ or a
text_encoder.json that names them) with the student in ``transformer/model.safetensors``, whose
metadata say what it is. No code comes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers import __version__ as diffusers_version
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scd_sf.files import new_folder, write_json
from scd_sf.generation.generate import clips_of, generate
from scd_sf.generation.request import choose_sampler, choose_shape
from scd_sf.models.build import (
    CheckpointConfig,
    SamplerConfig,
    Student,
    base_of,
    describe_checkpoint,
    family_of,
    load_student,
    probe_output,
    read_single,
    write_single,
)
from scd_sf.models.export import largest, must_be_new
from scd_sf.models.wan.components import copy_components
from scd_sf.models.wan.text import TextEncoderConfig, TransformersTextEncoder, load_text_encoder
from scd_sf.models.wan.vae import Vae, load_vae
from scd_sf.tensor_files import dtype_of
from scd_sf.types import UserError, VideoShape, device_of

STUDENT = Path("transformer") / "model.safetensors"


@dataclass(frozen=True)
class Description:
    """Settings of a pipeline directory: how text is encoded, model and sampler, provenance, and the
    folder of the VAE and the text encoder."""

    text: TextEncoderConfig
    checkpoint: CheckpointConfig
    origin: dict[str, object]
    source: Path


class SCDWanPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Text to video, frame by frame. Components: ``transformer`` (the student), ``vae``,
    ``text_encoder``, ``tokenizer``. The sampler, its steps and the video size are the checkpoint's
    own unless asked otherwise."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: Student,
        vae: AutoencoderKLWan,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        description: Description | None = None,
    ) -> None:
        super().__init__()
        if description is None:
            raise UserError("SCDWanPipeline: has no description; make it with from_pretrained")
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.description = description
        self._vae = Vae(vae)
        self._text = TransformersTextEncoder(text_encoder, tokenizer, description.text)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SCDWanPipeline:
        """Read a directory of :meth:`save_pretrained` or ``scd export``. Local files only;
        UserError names what is missing. ``dtype`` is the student's and the text encoder's; the VAE
        computes in fp32."""
        root, device = Path(path), device_of(device)
        config, origin = read_single(root / STUDENT)
        student, _ = load_student(root / STUDENT)
        text = load_text_encoder(root, device=device, dtype=dtype)
        vae = load_vae(root, device=device)
        description = Description(text.config, config, origin, root)
        return cls(student.to(device, dtype), vae.model, text.model, text.tokenizer, description)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a pipeline directory: the student in its present dtype, all else as it was read."""
        description = self.description
        dtype = next(self.transformer.parameters()).dtype
        write_pipeline(
            Path(path),
            self.transformer,
            description.checkpoint,
            description.origin,
            description.source,
            dtype,
        )

    def shape(self, frames: int | None, height: int | None, width: int | None) -> VideoShape:
        """Latent shape of a clip of these pixel sizes; None: as in training. UserError: sizes that
        do not divide."""
        description = self.description
        requested_size = {"frames": frames, "height": height, "width": width}
        return choose_shape(
            requested_size,
            description.origin,
            self.transformer,
            self._vae.geometry,
            str(description.source),
        )

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        sampler: SamplerConfig | None = None,
        force: bool = False,
    ) -> Iterator[Tensor]:
        """Yield (B, n, 3, H, W) in [0, 1] as latent frames are generated and decoded: first one
        frame, then four each.

        ``seed``: one for all prompts, or one per prompt. A clip depends on its prompt and seed
        alone: ``scd sample`` makes the same one of them.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if not prompts or len(seeds) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each prompt"
            )
        shape, description = self.shape(frames, height, width), self.description
        steps = choose_sampler(
            description.checkpoint.sampler, sampler, str(description.source), force=force
        ).build()
        student: Student = self.transformer
        device = next(student.parameters()).device
        cond = self._text.encode(prompts).to(device)
        yield from generate(student, self._vae, cond, seeds, shape, steps)

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> WanPipelineOutput:
        """Whole clips: ``.frames`` is (B, F, 3, H, W) in [0, 1]. Options as for :meth:`stream`."""
        return WanPipelineOutput(frames=clips_of(self.stream(prompt, **options)))


def write_pipeline(
    out: Path,
    student: Student,
    config: CheckpointConfig,
    origin: dict[str, object],
    base: Path,
    dtype: torch.dtype,
) -> Student:
    """A pipeline directory: the student, and VAE and text encoder copied from ``base`` (a Wan
    directory).

    Returns the student as it is read again from there; nothing stands at ``out`` before that.
    UserError also for a file of ``base`` that cannot be read as what it should be.
    """
    if not (base / "vae").is_dir():
        raise UserError(
            f"{base}: has no vae/; give the Wan directory in diffusers layout that the student came from"
        )
    must_be_new(out, base)
    with new_folder(out, "choose another place") as part:
        write_single(part / STUDENT, student, config, origin, dtype)
        copy_components(base, part)
        entries = {
            "transformer": ["scd_sf", family_of(student)],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }
        entries |= {
            name: ["transformers", kind]
            for name, kind in (
                ("text_encoder", "AutoModelForTextEncoding"),
                ("tokenizer", "AutoTokenizer"),
            )
        }
        index = {
            "_class_name": "SCDWanPipeline",
            "_diffusers_version": diffusers_version,
            **entries,
        }
        write_json(part / "model_index.json", index)
        reloaded: Student = SCDWanPipeline.from_pretrained(part).transformer
    return reloaded


def export_pipeline(
    checkpoint: Path, out: Path, weights: str = "ema", dtype: str = "bf16", base: str = ""
) -> float:
    """A checkpoint as a pipeline directory; the largest output difference after reading it again.

    ``base``: the Wan directory with VAE and text encoder (empty: the one the checkpoint names).
    """
    kind = dtype_of(dtype)
    must_be_new(out)
    student, config = load_student(checkpoint, weights)
    _, origin = describe_checkpoint(checkpoint)
    folder = base_of(config.base, base, checkpoint)
    expected_output = probe_output(student)
    reloaded = write_pipeline(out, student, config, {**origin, "weights": weights}, folder, kind)
    return largest(expected_output, probe_output(reloaded))
