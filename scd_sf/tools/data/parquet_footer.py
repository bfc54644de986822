"""How large the row groups of a parquet file are, by its own footer: polars reads each whole, and does not ask.

The footer is a ``FileMetaData`` in thrift's compact protocol (apache/parquet-format, parquet.thrift): the file ends
with it, its length in four bytes and ``PAR1``.
"""

from __future__ import annotations

import os
from pathlib import Path

from scd_sf.types import UserError

ROW_GROUP = 8 * 2**30  # bytes of a row group without compression; 64 clips of 81 frames at 480x832 are 1.1e9
LARGEST_FOOTER = 2**28
DEPTH = 32  # of structures in each other; parquet's own have eight
TRUTHS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
ROW_GROUPS, COLUMNS, META, UNCOMPRESSED = 4, 1, 3, 6  # numbers of the fields that are read

Value = int | bytes | list["Value"] | dict[int, "Value"]


def check_row_groups(path: Path, most: int) -> None:
    """UserError naming the first row group that takes more than ``most`` bytes without compression.

    ValueError for a footer that cannot be read. What the file says is believed; a dictionary's repetitions, which its
    pages hold once, count once.
    """
    groups = _field(_footer(path), ROW_GROUPS)
    for number, group in enumerate(groups if isinstance(groups, list) else []):
        columns = _field(group, COLUMNS)
        parts = [_field(_field(column, META), UNCOMPRESSED) for column in columns] if isinstance(columns, list) else []
        size = sum(part for part in parts if isinstance(part, int))
        if size > most:
            raise UserError(
                f"{path}: row group {number} takes {size / 2**30:.3g} GiB, more than {most / 2**30:.3g}; "
                "write the file again in smaller row groups"
            )


def _field(value: object, number: int) -> object:
    return value.get(number) if isinstance(value, dict) else None


def _footer(path: Path) -> dict[int, Value]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or not 0 < length <= min(size - 8, LARGEST_FOOTER):
            raise ValueError("it does not end as a parquet file does")
        file.seek(size - 8 - length)
        return _Reader(file.read(length)).structure(0)


class _Reader:
    """Values of thrift's compact protocol, one after the other. ValueError where they end too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        part = self.data[self.place : self.place + count]
        if len(part) != count:
            raise ValueError("its footer is cut off")
        self.place += count
        return part

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer has a number of more than 64 bits")

    def integer(self) -> int:
        coded = self.varint()
        return (coded >> 1) ^ -(coded & 1)

    def structure(self, depth: int) -> dict[int, Value]:
        """Field number -> value."""
        fields: dict[int, Value] = {}
        number = 0
        while (head := self.take(1)[0]) != 0:
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            fields[number] = kind if kind in TRUTHS else self.value(kind, depth + 1)
        return fields

    def value(self, kind: int, depth: int) -> Value:
        if depth > DEPTH:
            raise ValueError("its footer is nested too deep")
        if kind in (*TRUTHS, BYTE):  # a truth in a list is a byte
            return self.take(1)[0]
        if kind in INTEGERS:
            return self.integer()
        if kind in (DOUBLE, BINARY):
            return self.take(8 if kind == DOUBLE else self.varint())
        if kind == STRUCT:
            return self.structure(depth)
        if kind in LISTS:
            head = self.take(1)[0]
            count = head >> 4 if head >> 4 < 15 else self.varint()
            if count > len(self.data):
                raise ValueError("its footer has a list that is longer than itself")
            return [self.value(head & 15, depth + 1) for _ in range(count)]
        raise ValueError(f"its footer has a value of kind {kind}")
