"""A student as a diffusers pipeline, with the names and types of diffusers' own: ``pipe(prompt)``
for whole clips, ``pipe.stream(prompt)`` for frames as they come.

    pipe = SCDWanPipeline.from_pretrained("exported")  # `scd export RUN exported --layout pipeline`
    frames = pipe("a red car in the rain", seed=1).frames[0]  # numpy (F, H, W, 3) in [0, 1]
    for frames in pipe.stream("a red car in the rain"): ...  # tensors (1, n, 3, H, W)

The directory has diffusers' layout (model_index.json, vae/, text_encoder/ and tokenizer/ or a
text_encoder.json that names them) with the student in ``transformer/model.safetensors``, whose
metadata say what it is. No code comes with it, so ``DiffusionPipeline.from_pretrained``, which
knows diffusers' own classes alone, refuses it with an error that names this class.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers import __version__ as diffusers_version
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scd_sf.data.start import check_start
from scd_sf.diffusion.samplers import OnStep, first_step
from scd_sf.files import new_folder, write_json
from scd_sf.generation.generate import check_window, clip_latents, clips_of, decoded
from scd_sf.generation.guided import SampleGuidance
from scd_sf.generation.inputs import chunk_inputs
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.generation.request import (
    check_changes,
    check_past,
    check_strength,
    check_whole,
    choose_guidance,
    choose_seeds,
    choose_shape,
    choose_steps,
    choose_strength,
    input_frames,
    start_pixels,
    unusual,
    video_pixels,
)
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
from scd_sf.models.wan.text import (
    TextEncoderConfig,
    TransformersTextEncoder,
    load_text_encoder,
    wan_negative,
)
from scd_sf.models.wan.vae import Vae, load_vae
from scd_sf.tensor_files import dtype_of
from scd_sf.types import Conditioning, UserError, VideoShape, device_of

STUDENT = Path("transformer") / "model.safetensors"
CLASS = "scd_sf.generation.pipeline.SCDWanPipeline"  # 0.1.0 wrote the last part alone
OUTPUT_TYPES = ("np", "pt", "pil", "latent")

# (pipeline, step, time * 1000, tensors) -> tensors to go on with
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]
Prompts = str | Sequence[str]
Later = Mapping[int, Prompts] | Sequence[tuple[int, Prompts]]

log = logging.getLogger(__name__)


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
    own unless asked otherwise. Letters: P prompts, B videos, F frames, n frames of a piece."""

    # student and VAE take turns within a clip: what is not named here stays on the GPU until its end
    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs = ("latents",)

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
        self._as_read = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        self._guidance_scale, self._interrupt = 1.0, False
        self._num_timesteps = self._num_pieces = 0

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> SCDWanPipeline:
        """Read a directory of :meth:`save_pretrained` or ``scd export``. Local files only;
        UserError names what is missing. ``dtype`` (or ``torch_dtype``, its older name) is the
        student's and the text encoder's, fp32 by default; the VAE computes in fp32."""
        if dtype and torch_dtype and dtype != torch_dtype:
            raise UserError(f"dtype is {dtype} and torch_dtype {torch_dtype}; give one of them")
        kind = _floating(dtype or torch_dtype or torch.float32)
        root, device = Path(path), device_of(device)
        if not root.is_dir():
            raise UserError(
                f"{root}: no such directory; give one of scd export, or fetch it with 'hf download' first"
            )
        _require_pipeline(root)
        config, origin = read_single(root / STUDENT)
        student, _ = load_student(root / STUDENT)
        text = load_text_encoder(root, device=device, dtype=kind)
        vae = load_vae(root, device=device)
        description = Description(text.config, config, origin, root)
        return cls(student.to(device, kind), vae.model, text.model, text.tokenizer, description)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a pipeline directory: the student in its present dtype, all else as it was read.
        UserError: VAE, text encoder or tokenizer are not those that were read."""
        description = self.description
        for name, part in self._as_read.items():
            if self.components[name] is not part:
                raise UserError(
                    f"{path}: {name} was exchanged, and only that of {description.source} is written; put it back"
                )
        write_pipeline(
            Path(path),
            self.transformer,
            description.checkpoint,
            description.origin,
            description.source,
            self.dtype,
        )

    # ---------------------------------------------------------------------------- device and dtype

    @property
    def dtype(self) -> torch.dtype:
        """The student's."""
        return next(self.transformer.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the student is; with offloading, where it waits."""
        return next(self.transformer.parameters()).device

    def to(
        self,
        *args: str | torch.device | torch.dtype | None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> SCDWanPipeline:
        """All parts on a device, student and text encoder in a dtype: ``to("cuda")``,
        ``to(torch.bfloat16)``, ``to("cuda", torch.bfloat16)``, or by name. The VAE stays fp32."""
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif arg is not None:
                device = arg
        if dtype is not None:
            self.transformer.to(_floating(dtype))
            _cast(self.text_encoder, dtype)
        if device is not None:
            place = device_of(device)
            if place.type != "cpu" and hasattr(self.transformer, "_hf_hook"):
                raise UserError(
                    f"device is {place}, but enable_model_cpu_offload places the parts; leave .to() out"
                )
            for part in (self.transformer, self.vae, self.text_encoder):
                part.to(place)
        return self

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Not supported: it hooks ``forward``, and the student is not called by it. UserError."""
        raise UserError("sequential offload is not supported; use enable_model_cpu_offload()")

    # The wrappers are made when they are used: they follow .to() and exchanged components.

    @property
    def _vae(self) -> Vae:
        return Vae(self.vae)

    @property
    def _text(self) -> TransformersTextEncoder:
        return TransformersTextEncoder(self.text_encoder, self.tokenizer, self.description.text)

    # ------------------------------------------------------------------------ state during a call

    @property
    def guidance_scale(self) -> float:
        """The w of the present or last call; 1 is off."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the present or last call was guided by a negative prompt."""
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the present or last call: those of a chunk times chunks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback set ``pipe._interrupt``: the clip ends with the present chunk."""
        return self._interrupt

    # -------------------------------------------------------------------------------------- inputs

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
    def encode_prompt(
        self,
        prompt: Prompts,
        negative_prompt: Prompts | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """``prompt_embeds`` and ``negative_prompt_embeds``, (B, L, E) fp32, B = P times videos per
        prompt. The second is None without guidance."""
        prompts = _texts(prompt, "prompt")
        states = self._encode(prompts).repeat_interleave(num_videos_per_prompt, 0)
        if not do_classifier_free_guidance:
            return states, None
        negative = self._encode(_texts(negative_prompt or "", "negative_prompt", len(prompts)))
        return states, negative.repeat_interleave(num_videos_per_prompt, 0)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, L, E) fp32 on the device that computes."""
        _onto_device(self.text_encoder)
        return self._text.encode(prompts).to(self._execution_device).text_BLE

    def _checked(
        self, text: Prompts | None, embeds: Tensor | None, name: str
    ) -> list[str] | Tensor:
        """P texts, or their states (P, at most L, E). UserError: neither, or of another kind."""
        if (text is None) == (embeds is None):
            raise UserError(f"set one of {name} and {name}_embeds")
        if text is not None:
            return _texts(text, name)
        assert embeds is not None
        length, width = self._text.max_length, self._text.width
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point() or not embeds.numel():
            raise UserError(f"{name}_embeds: give a tensor of encode_prompt, floating point")
        if embeds.ndim != 3 or embeds.shape[1] > length or embeds.shape[2] != width:
            raise UserError(
                f"{name}_embeds has shape {tuple(embeds.shape)}; it must be (prompts, at most {length}, {width})"
            )
        return embeds

    def _states(self, text: Prompts | None, embeds: Tensor | None, name: str) -> Tensor:
        """(P, L, E) of prompts, or of states of at most L tokens."""
        source = self._checked(text, embeds, name)
        if not isinstance(source, Tensor):
            return self._encode(source)
        padded = nn.functional.pad(source, (0, 0, 0, self._text.max_length - source.shape[1]))
        return padded.to(self._execution_device, torch.float32)

    def _null(
        self, guidance: SampleGuidance, text: Prompts | None, embeds: Tensor | None, prompts: int
    ) -> Tensor | None:
        """(P, L, E) of the negative prompts; None without guidance, with a warning where one was
        given."""
        if guidance.text.w == 1.0:
            if text or embeds is not None:
                log.warning(
                    "negative_prompt has no effect: guidance is off; set guidance_scale above 1"
                )
            return self._encode([""]) if guidance.on else None  # by corruption, which asks for one
        if text is None and embeds is None:
            text = ""
        count = len(self._checked(text, embeds, "negative_prompt"))
        if count not in (1, prompts):
            raise UserError(
                f"{prompts} prompts but {count} negative prompts; give one, or one for each"
            )
        return self._states(text, embeds, "negative_prompt").expand(prompts, -1, -1)

    def _known(
        self, image: object, start: object, prompts: int, shape: VideoShape
    ) -> Tensor | None:
        """Pixels (P, F, 3, H, W) that the clips begin with."""
        if image is None and start is None:
            return None
        if image is not None and start is not None:
            raise UserError("image and start are both set; give one of them")
        if image is not None and getattr(image, "ndim", 3) == 4:
            image = list(image)  # type: ignore[call-overload]  # a batch of arrays or tensors
        name = "start" if image is None else "image"
        pixels = start_pixels(start if image is None else image, prompts, shape, name)
        latent_frames = 1 + (pixels.shape[1] - 1) // shape.temporal
        check_start(latent_frames, self.transformer.chunk, shape, name)
        return pixels

    def _later(
        self, then: Later, shape: VideoShape, prompts: int, known_frames: int
    ) -> dict[int, list[str]]:
        """A prompt for each of the P clips, by the pixel frame from which on it holds. UserError:
        what is no prompt, or would not be seen."""
        try:
            pairs = sorted(dict(then).items(), key=operator.itemgetter(0))
        except (TypeError, ValueError) as error:
            raise UserError("then: give {pixel frame: prompt}, or pairs of these") from error
        if len(pairs) != len(then):
            raise UserError("then: gives two prompts from the same frame on; give one")
        for frame, _ in pairs:
            if type(frame) is not int or frame < 1:
                raise UserError(f"then: {frame!r} is no pixel frame; give a whole number from 1 on")
        check_changes([frame for frame, _ in pairs], shape, self.transformer.chunk, known_frames)
        return {frame: _texts(text, "then", prompts) for frame, text in pairs}

    def _changes(
        self, later: Mapping[int, Sequence[str]], history: str, per_prompt: int
    ) -> dict[int, PromptChange]:
        """Conditions of B rows from pixel frames on."""
        states = {frame: self._encode(texts) for frame, texts in later.items()}
        return {
            frame: PromptChange(Conditioning(state.repeat_interleave(per_prompt, 0)), history)
            for frame, state in states.items()
        }

    def _on_step(self, callback: Callback, tensor_inputs: Sequence[str]) -> OnStep:
        """``callback`` as the samplers call it, with latents as diffusers has them, (B, C, n, H,
        W)."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise UserError(
                f"callback_on_step_end_tensor_inputs names {unknown[0]}; only latents can be had"
            )
        if not callable(callback):
            raise UserError(f"callback_on_step_end is a {type(callback).__name__}; give a function")
        steps = iter(range(self._num_timesteps))

        def on_step(step: int, t: float, x: Tensor) -> Tensor:
            given = {name: x.transpose(1, 2) for name in tensor_inputs}
            back = callback(self, next(steps), torch.tensor(1000 * t), given) or {}
            if not isinstance(back, Mapping) or not isinstance(back.get("latents", x), Tensor):
                raise UserError('callback_on_step_end: return {"latents": tensor}, or nothing')
            if others := [name for name in back if name not in self._callback_tensor_inputs]:
                raise UserError(f"callback_on_step_end returns {others[0]}; only latents are taken")
            if "latents" not in back:
                return x
            if back["latents"].shape != x.transpose(1, 2).shape:
                raise UserError(
                    f"callback_on_step_end returns latents of shape {tuple(back['latents'].shape)}; "
                    f"it must be {tuple(x.transpose(1, 2).shape)}"
                )
            return back["latents"].transpose(1, 2).to(x)

        return on_step

    # --------------------------------------------------------------------------------------- calls

    @torch.no_grad()
    def stream(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        *,
        image: object = None,
        start: object = None,
        video: object = None,
        strength: float | None = None,
        then: Later | None = None,
        history: str = "keep",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pt",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        frames: int | None = None,
        window: int = 0,
        sink: int = 0,
        guidance: SampleGuidance | None = None,
        sampler: SamplerConfig | None = None,
        force: bool = False,
    ) -> Generator[Any, None, None]:
        """Frames of B videos, n at a time, as they are generated and decoded: first one, then four
        each. B = P times ``num_videos_per_prompt``, the videos of a prompt side by side.

        ``output_type``: "pt" (B, n, 3, H, W), "np" (B, n, H, W, 3), both in [0, 1], "pil" B lists
        of n, "latent" (B, C, n, H, W), not decoded. ``num_frames`` (or ``frames``), ``height``,
        ``width``: pixels; None: as trained. ``num_inference_steps``: steps of each chunk; a
        distilled student refuses others than its own, unless ``force``. ``sampler``: another one.

        A clip depends on its prompt and its seed alone: ``scd sample`` makes the same one of them.
        ``seed``: one for all prompts or one each; a prompt's n-th video adds n; None is 0.
        ``generator``: draws the seeds, so ``manual_seed(7)`` is another video than ``seed=7``.
        ``latents``: noise (B, C, F, H, W) to begin from.

        ``image``: the first frame: PIL, (H, W, 3), (3, H, W) or a path; a list or batch has one for
        each prompt. ``start``: the same of several frames: a video's path or (F, 3, H, W).
        ``video``: frames that the clips are made from, a path or pictures, for all prompts; as many
        as they give unless ``num_frames``. ``strength``: the share of noise that is put into them,
        by default 0.8, or the sampler's least where that is more; the sampler's first time at or
        below is taken (diffusers' is a share of the steps). No student is trained for it.
        ``then``: other prompts from pixel frames on, {41: "it rains"}; ``history``: what becomes of
        the past there (:class:`~scd_sf.generation.prompt_change.PromptChange`). ``window``: the last latent
        frames of history, which are kept, 0 all; ``sink``: its first, which stay too.

        ``negative_prompt`` ("wan": Wan 2.1's own) needs ``guidance_scale`` above 1, or ``guidance``,
        which has more kinds; without, it warns. ``callback_on_step_end(pipe, step, timestep,
        {"latents": (B, C, n, H, W)})`` comes after each step of each chunk; the latents that it
        returns are gone on with. UserError for all that cannot be.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is '{output_type}'; use {', '.join(OUTPUT_TYPES)}")
        check_whole(
            {
                "num_videos_per_prompt": num_videos_per_prompt,
                "num_inference_steps": num_inference_steps,
                "num_frames": num_frames,
                "frames": frames,
                "height": height,
                "width": width,
                "window": window,
                "sink": sink,
            },
            optional=("num_inference_steps", "num_frames", "frames", "height", "width"),
        )
        if num_videos_per_prompt < 1:
            raise UserError(f"num_videos_per_prompt is {num_videos_per_prompt}; use at least 1")
        if num_frames and frames and num_frames != frames:
            raise UserError(f"num_frames is {num_frames} and frames {frames}; give one of them")
        trained, source = self.description.checkpoint.sampler, str(self.description.source)
        steps = choose_steps(trained, sampler, num_inference_steps, source, force=force).build()
        shape = self.shape(num_frames or frames, height, width)
        kind = choose_guidance(guidance, guidance_scale)
        check_window(window, sink, self.transformer.chunk)
        check_past(history, bool(then))
        check_strength(strength, video is not None)
        prompts = len(self._checked(prompt, prompt_embeds, "prompt"))
        per_prompt = num_videos_per_prompt
        seeds = choose_seeds(seed, generator, prompts, per_prompt)
        inputs, begin = None, 0
        if video is not None:
            if image is not None or start is not None:
                raise UserError("video excludes image and start; give one of them")
            begin = first_step(steps, choose_strength(strength, steps))
            count, pixels = video_pixels(video, (shape.pixel_height, shape.pixel_width), "video")
            chunk = self.transformer.chunk
            made = input_frames(count, num_frames or frames or 0, shape, chunk, "video")
            shape = replace(shape, frames=1 + (made - 1) // shape.temporal)
            inputs = chunk_inputs(self._vae, pixels, chunk, steps.times[begin])
            log.warning(
                "strength %.4g: begins with noise %.4g, %d of %d steps; no student is trained to make videos anew",
                choose_strength(strength, steps),
                steps.times[begin],
                steps.steps - begin,
                steps.steps,
            )
        for remark in unusual(trained, kind, shape, window + sink, self.description.origin):
            log.warning("%s", remark)
        whole = (len(seeds), shape.channels, shape.frames, shape.height, shape.width)
        if latents is not None and (not isinstance(latents, Tensor) or latents.shape != whole):
            own_shape = tuple(getattr(latents, "shape", ())) or type(latents).__name__
            raise UserError(f"latents has shape {own_shape}; give a tensor {whole}")
        known = self._known(image, start, prompts, shape)
        known_frames = 0 if known is None else 1 + (known.shape[1] - 1) // shape.temporal
        later = self._later(then or {}, shape, prompts, known_frames)
        chunks = (shape.frames - known_frames) // self.transformer.chunk
        self._num_timesteps = chunks * (steps.steps - begin)
        self._num_pieces = chunks + (known is not None)
        self._guidance_scale, self._interrupt, vae = kind.text.w, False, self._vae
        on_step = callback_on_step_end and self._on_step(
            callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        null = self._null(kind, negative_prompt, negative_prompt_embeds, prompts)
        states = self._states(prompt, prompt_embeds, "prompt")
        parts = clip_latents(
            self.transformer,
            vae,
            Conditioning(states.repeat_interleave(per_prompt, 0)),
            seeds,
            shape,
            steps,
            window=window,
            sink=sink,
            start=None if known is None else known.repeat_interleave(per_prompt, 0),
            changes=self._changes(later, history, per_prompt),
            guidance=kind,
            null=None if null is None else Conditioning(null.repeat_interleave(per_prompt, 0)),
            initial=None if latents is None else latents.transpose(1, 2),
            on_step=on_step,
            inputs=inputs,
        )
        if output_type == "latent":
            return self._placed(part.transpose(1, 2) for part in self._until_interrupt(parts))
        pixels = decoded(vae, self._until_interrupt(parts))
        return self._placed(_converted(part, output_type) for part in pixels)

    def _until_interrupt(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            yield part
            if self._interrupt:
                return

    @torch.no_grad()
    def _placed(self, parts: Iterable[Any]) -> Generator[Any, None, None]:
        """``parts`` with student and VAE on the device that computes; offloaded at the end."""
        try:
            _onto_device(self.transformer)
            _onto_device(self.vae)
            yield from parts
        finally:
            self.maybe_free_model_hooks()

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        *,
        image: object = None,
        start: object = None,
        video: object = None,
        strength: float | None = None,
        then: Later | None = None,
        history: str = "keep",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        frames: int | None = None,
        window: int = 0,
        sink: int = 0,
        guidance: SampleGuidance | None = None,
        sampler: SamplerConfig | None = None,
        force: bool = False,
    ) -> Any:
        """Whole clips, a WanPipelineOutput: its ``frames`` is "np" (B, F, H, W, 3) or "pt" (B, F, 3,
        H, W) in [0, 1], "pil" B lists of F images, or "latent" (B, C, F, H, W); with
        ``return_dict=False`` a tuple of it. All else as for :meth:`stream`."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is '{output_type}'; use {', '.join(OUTPUT_TYPES)}")
        parts = self.stream(
            prompt,
            negative_prompt,
            image=image,
            start=start,
            video=video,
            strength=strength,
            then=then,
            history=history,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type="latent" if output_type == "latent" else "pt",
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            seed=seed,
            frames=frames,
            window=window,
            sink=sink,
            guidance=guidance,
            sampler=sampler,
            force=force,
        )
        pieces = []
        with self.progress_bar(total=self._num_pieces) as bar:
            for part in parts:
                pieces.append(part)
                bar.update()
        if output_type == "latent":
            made: Any = torch.cat(pieces, 2)
        else:
            made = _converted(clips_of(pieces), output_type)
        return WanPipelineOutput(frames=made) if return_dict else (made,)


def _converted(pixels: Tensor, output_type: str) -> Any:
    """(B, n, 3, H, W) in [0, 1] as "pt", "np" or "pil"."""
    if output_type == "pt":
        return pixels
    arrays = pixels.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return arrays
    return [DiffusionPipeline.numpy_to_pil(clip) for clip in arrays]


def _cast(encoder: PreTrainedModel, dtype: torch.dtype) -> None:
    """The text encoder in ``dtype``, but what its class keeps in fp32 where it is read as fp16."""
    kept = (encoder._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    for name, parameter in encoder.named_parameters():
        if not set(name.split(".")).intersection(kept):
            parameter.data = parameter.data.to(dtype)


def _onto_device(part: nn.Module) -> None:
    """Bring a part that is offloaded to where it computes. accelerate does so before ``forward``
    alone."""
    hook = vars(part).get("_hf_hook")
    if hook is not None:
        hook.pre_forward(part)


def _texts(text: Prompts, name: str, count: int | None = None) -> list[str]:
    """Prompts as a list, of ``count`` where one serves all. UserError: not texts, or too few.
    "wan" as a negative prompt is Wan 2.1's own."""
    texts: Sequence[object] = ()
    if isinstance(text, str):
        texts = [text] * (count or 1)
    elif isinstance(text, Sequence):
        texts = list(text)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{name}: give a text, or a list of texts")
    if count is not None and len(texts) != count:
        raise UserError(
            f"{name}: {len(texts)} texts for {count} prompts; give one, or one for each"
        )
    words = [str(one) for one in texts]
    return [wan_negative(one) for one in words] if name == "negative_prompt" else words


def _require_pipeline(root: Path) -> None:
    """UserError for a directory without a student that is none of ``scd export`` either."""
    index = root / "model_index.json"
    is_pipeline = index.is_file() and SCDWanPipeline.__name__ in index.read_text("utf-8", "replace")
    if not is_pipeline and not (root / STUDENT).is_file():
        raise UserError(
            f"{root}: no pipeline directory; make one of a run or a checkpoint with "
            "'scd export RUN DIR --layout pipeline'"
        )


def _floating(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype is {dtype}; use torch.float32, torch.bfloat16 or torch.float16")
    return dtype


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
            "_class_name": CLASS,
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
