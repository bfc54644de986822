"""Encoded prompts kept on disk: a prompt is encoded once per encoder, and a run without new prompts
loads none.

An entry is a safetensors file named by the hash of all that decides it: the cleaned prompt, the
encoder's settings, the contents of its weights, configuration and tokenizer, the computing type,
the kind of device, transformers' version. Every prompt is encoded alone, so that an entry does not
depend on what else was asked for. It holds the states of the true length and a checksum; a damaged
one is reported and made again. Any number of processes may share a folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scd_sf.data.bounded import BoundedFolder
from scd_sf.files import hash_json, new_file, sha256_bytes, sha256_file, sweep
from scd_sf.models.wan.text import (
    TextEncoder,
    TextEncoderConfig,
    TransformersTextEncoder,
    encoder_parts,
    encoder_width,
    load_text_encoder,
    pad_states,
    text_config,
)
from scd_sf.types import Conditioning, say

OFF = "off"
VERSION = 1  # of what an entry means
DECIDING = ("*.safetensors", "*.json", "*.model", "*.txt")  # weights, configuration, tokenizer


def open_text_encoder(
    source: Path | str | TextEncoderConfig,
    cache: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """The encoder behind the cache in the folder ``cache``: if empty, the user's own; if "off", the
    encoder without a cache.

    The user's own is ``$XDG_CACHE_HOME/scd_sf/text`` (``~/.cache/scd_sf/text``). UserError as
    load_text_encoder.
    """
    if cache == OFF:
        return load_text_encoder(source, device=device, dtype=dtype)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(cache).expanduser() if cache else home / "scd_sf" / "text"
    return CachedTextEncoder(source, folder, device=device, dtype=dtype)


class CachedTextEncoder:
    """A :class:`TextEncoder` that reads known prompts from ``folder`` and is loaded when the first
    new one comes.

    Where the folder cannot be written, that is said once, and prompts are encoded as if there were
    no cache. ``limit``: bytes of all entries, of which the oldest go first (None: no limit).
    """

    def __init__(
        self,
        source: Path | str | TextEncoderConfig,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        limit: int | None = None,
    ) -> None:
        self.config = text_config(source)
        self.width = encoder_width(self.config)
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self._budget = None if limit is None else BoundedFolder(folder, limit, "*.safetensors")
        self._writable = True
        self._swept_folders: set[Path] = set()

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @cached_property
    def encoder(self) -> TransformersTextEncoder:
        """The encoder itself."""
        return load_text_encoder(self.config, device=self.device, dtype=self.dtype)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(pad_states(self.states(prompts), self.max_length))

    def states(self, prompts: Sequence[str]) -> list[Tensor]:
        texts = [self.config.cleaned(prompt) for prompt in prompts]
        states_of = {
            text: self._states(text, prompt)
            for text, prompt in dict(zip(texts, prompts, strict=True)).items()
        }
        return [states_of[text] for text in texts]

    def _states(self, text: str, prompt: str) -> Tensor:
        key = hash_json([self._identity, text])
        file = self.folder / key[:2] / f"{key}.safetensors"
        states = self._read(file)
        if states is None:
            states = self.encoder.states([prompt])[0].cpu().contiguous()
            self._write(
                file,
                save({"states": _narrow(states)}, {"sha256": _checksum(key, states)}),
                self._budget,
            )
        return states

    def _read(self, file: Path) -> Tensor | None:
        """The states of an entry; None where it is missing, or damaged, which is printed."""
        try:
            with safe_open(file, framework="pt") as entry:
                tensor, metadata = entry.get_tensor("states"), entry.metadata()
            states = tensor.float()
            fits = tensor.dtype in (torch.float32, torch.bfloat16) and states.shape[1:] == (
                self.width,
            )
            if fits and metadata == {"sha256": _checksum(file.stem, states)}:
                return states
            reason = "its contents do not fit its checksum"
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            reason = str(error)
        say(f"{file}: damaged entry of the text cache ({reason}); the prompt is encoded again")
        return None

    def _write(self, file: Path, data: bytes, budget: BoundedFolder | None = None) -> None:
        """Readers see nothing or the whole file, whoever else writes it."""
        if not self._writable:
            return
        try:
            if budget is not None:
                budget.write(file, data)
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.parent not in self._swept_folders:  # what killed processes left, once
                sweep(file.parent)
                self._swept_folders.add(file.parent)
            with new_file(file, durable=False) as part:
                part.write_bytes(data)
        except OSError as error:
            self._writable = False
            say(f"{file}: cannot be written ({error.strerror}); new prompts are not kept")

    @cached_property
    def _identity(self) -> list[object]:
        """A JSON value of everything but the prompt that the states depend on."""
        weights, tokens = encoder_parts(self.config)
        files = (
            {weights}
            if weights.is_file()
            else {file for part in DECIDING for file in weights.glob(part)}
        )
        files |= {file for part in DECIDING for file in tokens.glob(part)}
        contents = sorted([file.name, self._sha256(file)] for file in files)
        return [
            VERSION,
            transformers.__version__,
            self.config.settings,
            str(self.dtype),
            self.device.type,
            contents,
        ]

    def _sha256(self, file: Path) -> str:
        """sha256 of a file's contents. It is computed again only when path, size or a time of
        change differ, as in git's index."""
        stat = file.stat()
        key = hash_json([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        note = self.folder / "weights" / key
        try:
            digest = note.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            digest = ""
        if len(digest) != 64:
            digest = sha256_file(file)
            self._write(note, digest.encode())
        return digest


def _narrow(states: Tensor) -> Tensor:
    """``states`` in bf16 where that is exact, which halves the disk space; otherwise unchanged."""
    narrow = states.bfloat16()
    return narrow if torch.equal(narrow.float(), states) else states


def _checksum(key: str, states: Tensor) -> str:
    return sha256_bytes(key.encode() + states.numpy().tobytes())
