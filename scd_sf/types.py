"""Types that all packages share: video geometry, conditioning, the denoiser's interface, and errors
for people.

Letters: B batch, F latent frames, C latent channels, H W latent height and width, L tokens, E
width.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol, TextIO

# annotations only: tools that need no tensors start without torch (0.5 GiB, seconds)
if TYPE_CHECKING:
    import torch
    from rich.text import Text
    from torch import Tensor

Logs = dict[str, float]


class UserError(ValueError):
    """Bad input from a person: one line that names the file, the field and the remedy. Scripts exit
    with code 2."""


# Control characters but line breaks, half surrogates, and marks that reverse the direction of text.
_UNSEEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
# Errors of a file's place: no space, quota, read-only, no rights, a missing or too long name.
_PLACE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOENT,
    errno.EIO,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.ESTALE,
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}  # more room would help
# Largest clip in latents: a day of frames, and sides that no model comes near.
LARGEST = {
    "frames": 2**19,
    "channels": 2**12,
    "height": 2**12,
    "width": 2**12,
    "temporal": 2**10,
    "spatial": 2**10,
}
_NO_MEMORY = "can't allocate memory"  # how PyTorch says it on a CPU
LONGEST = 4000  # characters of an error
INTERRUPTED = 130  # the exit code of a job that Ctrl-C ended, by the shells' custom


def printable(text: str) -> str:
    """Foreign text made fit for a terminal: characters that move the cursor or hide text become the
    replacement character."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def plural(count: int, noun: str) -> str:
    """A number with its noun, as 1 rank, 8 ranks."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line and flush, with the text made printable. All output for people uses this,
    because most of it holds names from foreign files."""
    print(printable(str(text).replace("\n", " ")), file=file, flush=True)


def as_cell(text: object) -> Text:
    """Foreign text for a table of ``rich``: printable, and without effect as markup."""
    from rich.text import Text

    return Text(printable(str(text)))


class _PrintableFormatter(logging.Formatter):
    """Log lines of every module, fit for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(text if record.exc_info else text.replace("\n", " "))


def check_within(
    config: object, bounds: Mapping[str, tuple[float, float]], where: str = ""
) -> None:
    """UserError for the first field of ``config`` outside its (least, most), named with ``where``
    before it. None, a field that is not set, is within all."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise UserError(
                f"{where}{name} is {value}; it must be between {least:.12g} and {most:.12g}"
            )


def exit_on_user_error(main: Callable[[], None]) -> NoReturn:
    """Run ``main``. One line on stderr and exit code 2 for a :class:`UserError` and for a place
    that cannot be written or read (full, read-only), or where memory does not suffice; one line and
    130 for Ctrl-C. Others keep their traceback."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableFormatter())
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer ends so at Ctrl-C, without a word
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        _leave("interrupted; the same command goes on where it stopped", INTERRUPTED)
    except OSError as error:
        _leave(f"error: {of_its_place(error)}", 2)
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or _NO_MEMORY in str(error)
        ):
            raise
        _leave(
            "error: this needs more memory than there is; use smaller sizes (scd plan counts those of a stage)",
            2,
        )
    sys.exit(0)


def of_its_place(error: OSError) -> UserError:
    """An error of a file's place as one for people, with the room that is left there, and what to
    do. Raises the error itself where the place is not the cause."""
    import os
    import shutil
    from pathlib import Path

    if error.errno not in _PLACE:
        raise error
    file = (
        Path(os.fsdecode(error.filename))
        if isinstance(error.filename, str | bytes | os.PathLike)
        else Path.cwd()
    )
    # os.path, because Path.is_dir raises where a name is too long or a folder may not be entered
    folder = next(
        (parent for parent in (file, *file.absolute().parents) if os.path.isdir(parent)), Path("/")
    )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UserError(
            f"{file}: what is there is no folder ({error.strerror}); use another place, then run again"
        )
    if error.errno not in _FULL:
        return UserError(f"{file}: {error.strerror}; use another place, then run again")
    free = shutil.disk_usage(folder).free
    return UserError(
        f"{file}: {error.strerror} ({free / 1e9:.2f} GB free there); make room or use another place, then run again"
    )


def _leave(line: str, code: int) -> NoReturn:
    say(line if len(line) <= LONGEST else f"{line[: LONGEST - 2]}..", sys.stderr)
    sys.exit(code)


def device_of(name: str | torch.device) -> torch.device:
    """The device that a person named; empty: a GPU if there is one. UserError: no such kind, or no
    GPU here."""
    import torch

    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device is '{name}', which is unknown; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is '{name}', which nothing here was written for; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= (
        torch.cuda.device_count() if has_cuda else 0
    ):
        raise UserError(f"device is '{name}', but no such CUDA device is visible; use cpu")
    return device


def on_device(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """x on ``device``. A GPU gets it from pinned memory, so that the host does not wait for what
    the GPU still does."""
    import torch

    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.to(dtype or x.dtype).pin_memory().to(device, non_blocking=True)
    return x.to(device, dtype or x.dtype)


@dataclass(frozen=True)
class VideoShape:
    """Latent geometry of one clip, and what it means in pixels.

    ``frames`` latent frames of ``channels x height x width``. The Wan VAE maps 1 + temporal*k pixel
    frames to 1 + k latent frames and divides height and width by ``spatial``.
    """

    frames: int
    channels: int
    height: int
    width: int
    temporal: int = 4
    spatial: int = 8

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise UserError(
                    f"video shape: {name} is {getattr(self, name)} in latents; it must be 1 .. {most:,}"
                )

    @classmethod
    def from_pixels(
        cls,
        frames: int,
        height: int,
        width: int,
        *,
        channels: int = 16,
        temporal: int = 4,
        spatial: int = 8,
    ) -> VideoShape:
        """The latent shape of a pixel clip. Raises UserError unless frames = 1 + temporal*k and
        sizes divide."""
        if (frames - 1) % temporal or frames < 1:
            near = 1 + temporal * max(0, round((frames - 1) / temporal))
            raise UserError(
                f"frames is {frames}; the VAE needs 1 + {temporal}*k frames: use {near}"
            )
        for name, size in (("height", height), ("width", width)):
            if size % spatial:
                raise UserError(f"{name} is {size}; it must be a multiple of {spatial}")
        return cls(
            1 + (frames - 1) // temporal,
            channels,
            height // spatial,
            width // spatial,
            temporal,
            spatial,
        )

    @property
    def pixel_frames(self) -> int:
        return 1 + (self.frames - 1) * self.temporal

    @property
    def pixel_height(self) -> int:
        return self.height * self.spatial

    @property
    def pixel_width(self) -> int:
        return self.width * self.spatial

    def latent(self, batch: int) -> tuple[int, int, int, int, int]:
        """(B, F, C, H, W)."""
        return (batch, self.frames, self.channels, self.height, self.width)


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a model. Absent ones are None; absent text is (B, 0, 0).

    ``text_BLE``: token states (B, L, E), exactly zero after each prompt's true length (as Wan).
    ``actions_BF`` has one number per frame, the action that led to it, and ``labels_B`` one per
    clip. -1 is the null action or label. ``decoder_actions_BF``: what SCD's decoder is told instead
    (None: the same): it is guided without its encoder.
    """

    text_BLE: Tensor
    actions_BF: Tensor | None = None
    labels_B: Tensor | None = None
    decoder_actions_BF: Tensor | None = None

    @classmethod
    def of_frames(
        cls, batch: int, actions_BF: Tensor | None = None, labels_B: Tensor | None = None
    ) -> Conditioning:
        """Conditions without text."""
        import torch

        return cls(torch.zeros(batch, 0, 0), actions_BF, labels_B)

    @property
    def batch(self) -> int:
        return self.text_BLE.shape[0]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        parts = (self.text_BLE, self.actions_BF, self.labels_B, self.decoder_actions_BF)
        text, *signals = (None if part is None else change(part) for part in parts)
        assert text is not None
        return Conditioning(text, *signals)

    def to(self, device: torch.device | str) -> Conditioning:
        return self._each(lambda part: on_device(part, device))

    def expand(self, batch: int) -> Conditioning:
        """One clip's conditions for a batch of ``batch`` (B=1 -> B=batch), without a copy."""
        return self._each(lambda part: part.expand(batch, *part.shape[1:]))

    def repeat(self, times: int) -> Conditioning:
        """(B, ...) -> (times*B, ...), whole batch after whole batch."""
        return self._each(lambda part: part.repeat(times, *(1 for _ in part.shape[1:])))

    def rows(self, indices: slice) -> Conditioning:
        """The conditions of the rows ``indices`` of the batch."""
        return self._each(lambda part: part[indices])

    def cat(self, other: Conditioning) -> Conditioning:
        """Both batches as one, this one first. UserError unless they have the same kinds of
        conditions."""
        import torch

        pairs = [
            (getattr(self, name), getattr(other, name))
            for name in ("text_BLE", "actions_BF", "labels_B", "decoder_actions_BF")
        ]
        if any((first is None) != (second is None) for first, second in pairs):
            raise UserError(
                "conditions of different kinds cannot be joined: give both batches the same"
            )
        text, *signals = (
            None if first is None else torch.cat([first, second]) for first, second in pairs
        )
        assert text is not None
        return Conditioning(text, *signals)


class Tokenizer(Protocol):
    """An image autoencoder, frame by frame. Latents are normalised to about mean 0, variance 1."""

    @property
    def channels(self) -> int: ...

    @property
    def spatial(self) -> int:
        """Pixels per latent along a side."""
        ...

    def encode(self, frames_BF3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1], fp32 -> latents (B, F, C, H / spatial, W / spatial), fp32, the mode of
        the posterior."""
        ...

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Latents -> pixels (B, F, 3, H, W), fp32, not clamped."""
        ...


class Denoiser(Protocol):
    """A bidirectional model as losses and samplers see it: teacher, critic, or a student frozen on
    one stream."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, /) -> Tensor:
        """x_t (B,F,C,H,W), t (B,) or (B,F) in [0,1] -> velocity eps - x_0, same shape as x_t,
        fp32."""
        ...
