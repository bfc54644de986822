"""What page and server say to each other over one WebSocket.

Both send JSON objects with a ``type``; the page's are read strictly (unknown types and fields are
refused). A binary message of the page is a start picture, or a camera's frame (camera.py). A binary
message of the server is a frame, 16 bytes (:data:`HEADER`) and its picture; or, right after the JSON
message ``file``, a file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from scd_sf.tools.serve.pictures import Codec, EncodedPicture
from scd_sf.types import UserError

# Frame of its clip from 0; chunk of its connection from 1; microseconds from the clip's beginning to
# the time at which the frame is shown, and in their highest byte flags (none: a JPEG).
HEADER = struct.Struct(">IIQ")
IS_H264, IS_KEY = 1, 2  # flags: H.264, Annex B; one of its key frames
FLAGS_SHIFT = 56
MOST_TEXT = 16 * 1024  # bytes of a JSON message
MOST_PICTURE = 8 * 2**20  # bytes of a start picture; larger messages are refused unread
MOST_PROMPT = 2000  # characters
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE_PIXELS = 2**24

Prompt = Annotated[str, Meta(max_length=MOST_PROMPT)]
Seed = Annotated[int, Meta(ge=0, lt=2**53)]  # whole numbers that JavaScript has
Count = Annotated[int, Meta(ge=0, lt=2**32)]
Strength = Annotated[float, Meta(gt=0, le=1)]


# ------------------------------------------------------------------------------- from the page


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """The first message of every connection. ``token``: empty where none is asked for. ``watch``:
    watch along instead of having the seat; such a page says nothing more but ``shown``."""

    token: Annotated[str, Meta(max_length=256)] = ""
    watch: bool = False


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="start"):
    """A new clip, instead of the one that plays. Of several that come before the next chunk the last
    one is made, and it alone is answered by ``started``. ``picture``: begin with the last start picture.
    ``camera``: made from the camera's frames, which follow, with this share of noise at first."""

    prompt: Prompt
    seed: Seed
    picture: bool = False
    camera: bool = False
    strength: Strength = 1.0


class ChangePrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="prompt"):
    """Another prompt from the next chunk on. Of several that come before it the last one holds, and
    it alone is answered by ``switched``; by an error where the clip ends first. ``history``: what
    becomes of the past (:class:`~scd_sf.generation.prompt_change.PromptChange`)."""

    prompt: Prompt
    history: Literal["keep", "recache", "flush"] = "keep"


class ChangeStrength(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="strength"):
    """Another share of noise in the camera's frames, from the next chunk on."""

    strength: Strength


class CameraOff(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="camera_off"):
    """No further frames of the camera: the clip goes on from noise."""


class Pause(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="pause"):
    """Make no further chunk, or go on."""

    on: bool


class Shown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shown"):
    """All chunks up to this one were shown: credit for more."""

    chunk: Count


class Download(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="download"):
    """The kept frames as an mp4 with its manifest, please."""


class UseCodec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="codec"):
    """Pictures in this codec from the next chunk on, which are JPEGs unless this is said. A stream of
    H.264 begins with every clip and every ``codec``."""

    codec: Codec


Request = (
    Hello | Start | ChangePrompt | ChangeStrength | CameraOff | Pause | Shown | Download | UseCodec
)
_reader = msgspec.json.Decoder(Request)


def read_request(text: str) -> Request:
    """A message of the page. UserError: too long, malformed, or nothing that a page says."""
    if len(text.encode("utf-8", "surrogatepass")) > MOST_TEXT:
        raise UserError(f"a message is longer than {MOST_TEXT} bytes")
    try:
        request: Request = _reader.decode(text)
        # "\ud800" is JSON, and no text: tokenizers cannot take it
        for value in (getattr(request, name) for name in request.__struct_fields__):
            if isinstance(value, str):
                value.encode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UserError(f"a message was not understood: {str(error)[:200]}") from error
    return request


# ------------------------------------------------------------------------------- from the server


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """The seat is the page's. ``seconds``: of the last frames that can be downloaded. ``h264``: what
    WebCodecs calls the H.264 that the page may ask for; empty: none, for the reason ``no_h264``.
    ``levels``: the shares of noise that a camera's frames may begin with, falling from 1. ``model``:
    the name of what plays, no path of the server."""

    fps: int
    width: int
    height: int
    seconds: float
    ahead: int
    h264: str
    no_h264: str
    levels: tuple[float, ...]
    model: str
    most_prompt: int = MOST_PROMPT
    most_picture: int = MOST_PICTURE


class Busy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="busy"):
    """Somebody else has the seat, or too many watch along; the connection is closed. ``may_watch``:
    there is room to watch along."""

    may_watch: bool


class Watching(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="watching"):
    """The page watches along: it gets what the viewer gets, always as JPEGs. ``model``: as in
    :class:`Ready`. What was said of the clip that plays comes next, up to its end or its pause."""

    fps: int
    width: int
    height: int
    model: str


class SeatState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="seat"):
    """To those who watch along: whether the seat can be taken."""

    is_free: bool


class Paused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="paused"):
    """To those who watch along: the viewer has paused, or goes on."""

    on: bool


class Missed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="missed"):
    """To one who watches along: so many chunks before the next one were left out, because those
    before them had not been shown."""

    chunks: int


class Watchers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="watchers"):
    """To the viewer: so many watch along."""

    count: int


class Started(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="started"):
    """A clip begins: what is left of the one before is void, and needs no ``shown``."""

    seed: int
    prompt: str


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chunk"):
    """Comes before the ``frames`` frames of a chunk, of which ``first`` is the first. Figures: pixel
    frames per second of the DiT and of the VAE with the pictures, each while it works, over the last
    chunks; seconds from the request to the clip's first chunk. ``camera``: the number of the newest
    camera frame that the chunk is made from; -1: none."""

    chunk: int
    first: int
    frames: int
    dit_fps: float
    vae_fps: float
    first_seconds: float
    camera: int = -1


class Switched(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="switched"):
    """The prompt holds from this frame on; ``history``: as it was asked for."""

    frame: int
    prompt: str
    history: str


class Ended(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ended"):
    """The clip has as many frames as the server makes of one."""

    frames: int


class PictureRead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="picture"):
    """A start picture was read, of this size."""

    width: int
    height: int


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="file"):
    """The next binary message is this file."""

    name: str
    bytes: int


class Error(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="error"):
    """A request was refused. ``ended``: the clip that was made has come to its end by it."""

    message: str
    ended: bool = False


Reply = (
    Ready
    | Busy
    | Watching
    | SeatState
    | Paused
    | Missed
    | Watchers
    | Started
    | Chunk
    | Switched
    | Ended
    | PictureRead
    | File
    | Error
)
# Hands a message over, with the binary ones that belong to it, from any thread.
Say = Callable[[Reply, Sequence[bytes]], None]


def text_of(reply: Reply) -> str:
    """JSON."""
    return msgspec.json.encode(reply).decode()


def frame_of(frame: int, chunk: int, fps: int, picture: EncodedPicture) -> bytes:
    """A frame as it is sent."""
    flags = 0
    if picture.codec == "h264":
        flags = IS_H264 | (IS_KEY if picture.is_key else 0)
    return HEADER.pack(frame, chunk, flags << FLAGS_SHIFT | frame * 1_000_000 // fps) + picture.data
