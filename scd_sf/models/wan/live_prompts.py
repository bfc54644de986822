"""A plain list of prompts, encoded while it is used: a million prompts need no terabyte of states
on a disk.

Every prompt is encoded alone, so that its states depend on nothing but the prompt and the encoder:
not on its batch, on the number of processes, on a resume, or on what a cache held.
``data_prep/encode_prompts.py`` encodes in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scd_sf.data.prompt_list import PromptList, is_list
from scd_sf.data.prompts import PromptSet, about_negative
from scd_sf.files import hash_json
from scd_sf.models.wan.text import (
    WAN_NEGATIVE_PROMPT,
    TextEncoder,
    TextEncoderConfig,
    encoder_width,
    load_text_encoder,
    pad_states,
    text_config,
    wan_negative,
)
from scd_sf.models.wan.text_cache import CachedTextEncoder
from scd_sf.tensor_files import dtype_of
from scd_sf.types import Conditioning, UserError


@dataclass
class LiveTextConfig:
    """How a list of prompts is encoded during a training. A directory of encoded prompts does not
    use it."""

    path: str = ""
    """Directory of the text encoder; empty: the teacher's, or else the critic's."""
    column: str = "prompt"
    """Column or key of the prompts in a csv or jsonl file."""
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Type that the encoder computes in."""
    cache: str = ""
    """Folder that keeps encoded prompts for other runs and ranks; empty: none."""
    cache_gb: float = 20.0
    """Largest size of that folder in GB; the oldest prompts go first."""

    def __post_init__(self) -> None:
        if self.cache_gb <= 0:
            raise UserError(f"text.cache_gb is {self.cache_gb}; it must be more than 0")


def find_text_encoder(cfg: LiveTextConfig, models: Sequence[str]) -> TextEncoderConfig:
    """The encoder that ``path`` names, or that of the first of ``models`` (Wan directories) that
    has one."""
    problems = []
    for source in [cfg.path] if cfg.path else models:
        try:
            return text_config(source)
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"{problems[0]}; or set text.path= to one that has it")


def open_prompts(
    source: Path,
    cfg: LiveTextConfig,
    models: Sequence[str],
    negative_prompt: str | None,
    device: torch.device,
) -> PromptSet | LivePrompts:
    """The prompts of ``source``: a directory of encoded ones, or a list. No weights are read yet.

    ``models``: Wan directories that may have the text encoder. ``negative_prompt``: None is what a
    directory was encoded with, and Wan's own for a list. UserError: as PromptSet or LivePrompts;
    settings against a directory's.
    """
    if is_list(source):
        negative = WAN_NEGATIVE_PROMPT if negative_prompt is None else wan_negative(negative_prompt)
        config = find_text_encoder(cfg, models)
        return LivePrompts(
            PromptList(source, cfg.column), config, cfg, negative_prompt=negative, device=device
        )
    prompts = PromptSet(source)
    if negative_prompt is not None and wan_negative(negative_prompt) != prompts.negative_prompt:
        raise UserError(
            f"negative_prompt is {negative_prompt[:60]!r}, but {source} was encoded with "
            f"{prompts.negative_prompt[:60]!r}; leave it out, or encode the prompts again"
        )
    if cfg != LiveTextConfig():
        raise UserError(
            f"text: {source} is encoded already, so it needs no text encoder; leave text.* out"
        )
    return prompts


def states_alone(encoder: TextEncoder, prompts: Sequence[str]) -> list[Tensor]:
    """(L_i, E) of each prompt, fp32, on the CPU: each encoded by itself."""
    return [encoder.states([prompt])[0].cpu() for prompt in prompts]


class LivePrompts:
    """:class:`scd_sf.data.prompts.Prompts` of a list. The encoder's weights are read by
    :meth:`load`, or when needed.

    ``conditioning`` may run in another thread: on a GPU it computes on a stream of its own, beside
    the training. UserError: the list, the encoder (all but its weights).
    """

    def __init__(
        self,
        prompts: PromptList,
        config: TextEncoderConfig,
        cfg: LiveTextConfig,
        *,
        negative_prompt: str,
        device: torch.device,
    ) -> None:
        self.list = prompts
        self.config = config
        self.cfg = cfg
        self.device = device
        self.where, self.negative_prompt = prompts.path, negative_prompt
        self.width, self.length = encoder_width(config), config.max_length
        self.hash = hash_json([prompts.hash, config.settings, cfg.dtype, negative_prompt])
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.list)

    def __str__(self) -> str:
        held_out = f" ({self.list.held_out:,} held out)" if self.list.held_out else ""
        encoder = self.config.path or self.config.package
        return (
            f"{self.where}: {len(self):,} prompts{held_out}, encoded as they are used "
            f"in {self.cfg.dtype} by {encoder}; {about_negative(self.negative_prompt)}"
        )

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these rows of the list."""
        return self.list.texts(indices)

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """(B, L, E) fp32, on the CPU."""
        with self._own_stream():
            states = states_alone(self._encoder, self.texts(indices))
        return Conditioning(pad_states(states, self.length))

    @cached_property
    def negative(self) -> Conditioning:
        """The encoded negative prompt (1, L, E), computed once."""
        with self._own_stream():
            return Conditioning(
                pad_states(states_alone(self._encoder, [self.negative_prompt]), self.length)
            )

    def load(self) -> None:
        """Read the weights and encode the negative prompt. UserError where they cannot be read."""
        if isinstance(self._encoder, CachedTextEncoder):
            _ = self._encoder.encoder
        _ = self.negative

    @cached_property
    def _encoder(self) -> TextEncoder:
        dtype = dtype_of(self.cfg.dtype)
        if not self.cfg.cache:
            return load_text_encoder(self.config, device=self.device, dtype=dtype)
        limit = round(self.cfg.cache_gb * 1e9)
        return CachedTextEncoder(
            self.config, Path(self.cfg.cache), device=self.device, dtype=dtype, limit=limit
        )

    def _own_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
