"""Small pictures as others make them: with colour profiles, and with chunks that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageCms

# Colorants (X, Y, Z of red, green, blue) under D50 of Adobe RGB (1998) and Display P3
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
D50 = (0.96420, 1.0, 0.82491)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))


def _profile(space: bytes, connection: bytes, kind: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """An ICC profile of version 2."""
    named = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": _xyz(D50),
        **tags,
    }
    table, body = struct.pack(">I", len(named)), b""
    for name, data in named.items():
        table += name + struct.pack(">II", 132 + 12 * len(named) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4s4s4s4s4s",
        132 + 12 * len(named) + len(body),
        bytes(4),
        b"\x02\x40\0\0",
        kind,
        space,
        connection,
    )
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:]
    return head.ljust(128, b"\0") + table + body


def rgb_profile(colorants: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """The profile of a screen."""
    tags = {
        name + b"XYZ": _xyz(value)
        for name, value in zip((b"r", b"g", b"b"), colorants, strict=True)
    }
    return _profile(
        b"RGB ",
        b"XYZ ",
        b"mntr",
        tags | {name + b"TRC": _gamma(gamma) for name in (b"r", b"g", b"b")},
    )


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": _gamma(gamma)})


def ink_profile(colours_16x3: np.ndarray) -> bytes:
    """The profile of a press, from the sRGB colours (uint8) of paper with none or all of cyan (8),
    magenta (4), yellow (2) and black (1); between them, linear in Lab."""
    screen, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    colours = Image.fromarray(colours_16x3[None])
    grid = ImageCms.profileToProfile(colours, screen, lab, outputMode="LAB")
    assert grid is not None
    values = np.asarray(grid) ^ np.array([0, 128, 128], np.uint8)  # Pillow's are signed
    matrix = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix
    ramp = bytes(range(256))
    tags = {b"A2B0": table + 4 * ramp + values.tobytes() + 3 * ramp}
    return _profile(b"CMYK", b"Lab ", b"prtr", tags)


def png(pixels: np.ndarray, chunks: Mapping[bytes, bytes]) -> bytes:
    """uint8 or uint16 (H, W, 3), or grey (H, W), as a PNG with ``chunks`` before the pixels."""
    deep = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    head = struct.pack(
        ">IIBBBBB", *pixels.shape[1::-1], 8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0, 0, 0, 0
    )
    parts = {b"IHDR": head, **chunks, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


def iccp(profile: bytes) -> bytes:
    """The chunk of a PNG's profile."""
    return b"x\0\0" + zlib.compress(profile)
