"""Near-duplicates: MinHash signatures (rensa's R-MinHash) of byte n-grams, LSH bands, confirmed by the signatures.

A key's *class* is the logarithm of its length to the base 1 / ``jaccard``; keys that are compared are of one class or
of neighbouring ones. A *bucket* holds the keys of two neighbouring classes with one band of their signatures equal.
A row goes when its estimated Jaccard similarity to the first row of a bucket, or to the one before it there, is at
least ``jaccard``; what it repeats may itself be gone, the first of such a chain stays. So what happens to a row depends
on earlier rows only, and not on the number of processes; the work is linear in the rows.

Most rows share no band with any other. Windows of classes find those (in the workers, cheaply, and without ever
holding all signatures); only the rest are put into buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_sf.tools.prompts.filter.workers import Workers

SEED = 42  # of the signatures
LINE_FEED = 10
BLOCK = 20_000  # rows whose signatures are Python numbers at a time; pairs that are compared at a time
Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]
Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class NearDupConfig:
    """Near-duplicates by MinHash. 16 bands of 8 find 95 % of the pairs at 0.8, and more above."""

    jaccard: float = 0.8
    """Pairs at least this similar are one (Jaccard index of their n-grams)."""
    shingle: int = 3
    """Bytes of an n-gram."""
    permutations: int = 128
    """Hashes of a prompt."""
    bands: int = 16
    """Bands that the hashes are split into; divides ``permutations``."""
    window: int = 150_000
    """About how many rows a worker looks at together (memory: 1.5 KB a row)."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.jaccard < 1 or not 1 <= self.shingle <= 8 or self.window < 1:
            raise ValueError("jaccard must be from 0.1 to below 1, shingle from 1 to 8 bytes, window at least 1")
        if self.bands < 1 or self.permutations < 1 or self.permutations % self.bands:
            raise ValueError(f"bands is {self.bands}; it must divide permutations ({self.permutations})")


@dataclass(frozen=True)
class Keys:
    """What a worker gets: keys in UTF-8, joined by line feeds (a list of texts would be three times as large), each of
    at least ``cfg.shingle`` bytes and without a line feed of its own."""

    text: bytes
    cfg: NearDupConfig


def near_duplicates(
    keys: Callable[[Rows], bytes], lengths: Rows, cfg: NearDupConfig, workers: Workers
) -> dict[int, int]:
    """Row -> the earliest row that it repeats. ``keys`` gives the keys of some rows, as in :class:`Keys`; ``lengths``:
    bytes of each key in UTF-8."""
    suspects: Flags = np.zeros(len(lengths), np.bool_)
    classes = np.floor(np.log(np.maximum(lengths, 1)) / -np.log(cfg.jaccard)).astype(np.int64)
    members = list(windows(classes, cfg.window))
    tasks = (Keys(keys(rows), cfg) for rows in members)
    for rows, flags in zip(members, workers.map(suspicious, tasks), strict=True):
        suspects[rows[flags]] = True
    found = np.flatnonzero(suspects)
    blocks = (found[first : first + BLOCK] for first in range(0, len(found), BLOCK))
    parts = list(workers.map(signatures, (Keys(keys(rows), cfg) for rows in blocks)))
    if not parts:
        return {}
    signed: Signatures = np.concatenate(parts)
    later, earlier = confirmed(signed, *candidates(signed, classes[found], cfg.bands), cfg.jaccard)
    first = dict[int, int]()
    for row, other in zip(found[later].tolist(), found[earlier].tolist(), strict=True):
        first[row] = min(other, first.get(row, other))
    return first


def windows(classes: Rows, size: int) -> Iterator[Rows]:
    """Rows by window: every two neighbouring classes are together in one. At least one class and its neighbour each."""
    order = np.argsort(classes, kind="stable")
    names, starts = np.unique(classes[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    begin = 0
    while begin < len(names):
        last = begin
        while last + 1 < len(names) and ends[last + 1] - starts[begin] <= size:
            last += 1
        more = last + 1 < len(names) and names[last + 1] == names[last] + 1
        yield order[starts[begin] : ends[last + 1 if more else last]]
        begin = last + 1


def suspicious(keys: Keys) -> Flags:
    """Which keys share a band with another one of these."""
    import rensa

    matrix = _digests(keys)
    index = rensa.RMinHashLSH(keys.cfg.jaccard, keys.cfg.permutations, keys.cfg.bands)
    return np.array(index.query_duplicate_flags_matrix_one_shot(matrix), dtype=np.bool_)


def signatures(keys: Keys) -> Signatures:
    """The signatures (keys, permutations)."""
    rows = _digests(keys).to_rows()
    return np.array(rows, np.uint32).reshape(len(rows), keys.cfg.permutations)


def _digests(keys: Keys) -> Any:
    import rensa

    values, ends = shingles(keys.text, keys.cfg.shingle)
    return rensa.RMinHash.digest_matrix_from_flat_token_hashes(mixed(values), ends, keys.cfg.permutations, SEED)


def shingles(text: bytes, size: int) -> tuple[Hashes, Hashes]:
    """The byte n-grams of every line as numbers, one after another; and where each line's begin, and the last ones end.

    Every line has at least ``size`` bytes.
    """
    data = np.frombuffer(text, np.uint8)
    stops = np.append(np.flatnonzero(data == LINE_FEED), len(data))  # of the lines
    starts = np.append(0, stops[:-1] + 1)
    ends: Hashes = np.zeros(len(stops) + 1, np.uint64)
    ends[1:] = np.cumsum(stops - starts - size + 1)
    values: Hashes = np.empty(int(ends[-1]), np.uint64)
    for first in range(0, len(stops), BLOCK):
        last = min(first + BLOCK, len(stops))
        part = _shingles(data[starts[first] : stops[last - 1]], size)
        values[int(ends[first]) : int(ends[last])] = part
    return values, ends


def _shingles(data: NDArray[np.uint8], size: int) -> Hashes:
    count = len(data) - size + 1
    values: Hashes = np.zeros(count, np.uint64)
    inside: Flags = np.ones(count, np.bool_)  # no n-gram that reaches into the next line
    for place in range(size):
        values <<= np.uint64(8)
        values |= data[place : place + count]
        inside &= data[place : place + count] != LINE_FEED
    return values[inside]


def mixed(values: Hashes) -> Hashes:
    """Well-spread 64-bit hashes of numbers (the finalizer of MurmurHash3), in place."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values ^= values >> np.uint64(33)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(33)
    return values


def candidates(signed: Signatures, classes: Rows, bands: int) -> tuple[Rows, Rows]:
    """Pairs (later row, earlier row) that share a bucket: with its first row and with the one before."""
    rows, width = len(signed), signed.shape[1] // bands
    sides = mixed(
        (np.repeat(classes, 2) + np.tile([0, 1], rows)).astype(np.uint64)
    )  # with the shorter, the longer class
    found: list[Rows] = [np.zeros(0, np.int64)]
    for band in range(bands):
        key = np.zeros(rows, np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = mixed(key ^ signed[:, column])
        found.append(np.unique(_pairs(mixed(np.repeat(key, 2) ^ sides), rows)))
    pairs = np.unique(np.concatenate(found))
    return pairs // rows, pairs % rows


def _pairs(bucket: Hashes, rows: int) -> Rows:
    """later * rows + earlier, for every row of a bucket but its first; ``bucket`` names two per row."""
    order = np.argsort(bucket, kind="stable")
    opens = np.ones(len(bucket), np.bool_)
    opens[1:] = bucket[order][1:] != bucket[order][:-1]
    first = order[np.maximum.accumulate(np.where(opens, np.arange(len(bucket)), 0))]
    later = np.flatnonzero(~opens)
    return np.concatenate([order[later] // 2 * rows + other // 2 for other in (first[later], order[later - 1])])


def confirmed(signed: Signatures, later: Rows, earlier: Rows, jaccard: float) -> tuple[Rows, Rows]:
    """The pairs whose share of equal signature places, the estimate of their Jaccard similarity, is at least that."""
    good: Flags = np.zeros(len(later), np.bool_)
    for first in range(0, len(later), BLOCK):
        part = slice(first, first + BLOCK)
        good[part] = (signed[later[part]] == signed[earlier[part]]).mean(axis=1) >= jaccard
    return later[good], earlier[good]
