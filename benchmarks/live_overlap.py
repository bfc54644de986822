"""What ``scd serve`` makes when every chunk is shown at once: frames per second with both stages in one
thread and in two (``--overlap``), interleaved; medians and their ratio; and bytes of a picture.

    python benchmarks/live_overlap.py --checkpoint runs/demo/stage3-scd
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from scd_sf.config import HelpFormatter
from scd_sf.tools.serve.generator import ClipMaker, ClipRequest, Generator
from scd_sf.tools.serve.pictures import Codec
from scd_sf.tools.serve.protocol import HEADER, Chunk, Reply, Start
from scd_sf.tools.serve.server import ServeConfig, open_maker
from scd_sf.types import exit_on_user_error

WARM_UP = 4  # chunks that are not counted


class Round:
    """A viewer who shows each chunk as soon as it comes."""

    def __init__(self, maker: ClipMaker, chunks: int, codec: Codec = "jpeg") -> None:
        self.times: list[float] = []
        self.last: Chunk | None = None
        self.bytes = self.frames = 0
        self._enough, self._chunks = threading.Event(), chunks + WARM_UP
        generator = Generator(maker, self._enough.set)
        seat = generator.seat(self._hear)
        assert seat is not None
        self._generator, self._seat = generator, seat
        generator.start()
        generator.use_codec(seat, codec)
        generator.play(seat, ClipRequest(Start("", 0), None, "", time.monotonic()))
        self._enough.wait()
        generator.leave(seat)
        generator.stop()
        if generator.failure is not None:
            raise generator.failure

    def _hear(self, reply: Reply, binary: Sequence[bytes]) -> None:
        if not isinstance(reply, Chunk):
            return
        self.times.append(time.perf_counter())
        self.last = reply
        self.frames += reply.frames
        self.bytes += sum(len(frame) - HEADER.size for frame in binary)
        self._generator.shown(self._seat, reply.chunk)
        if reply.chunk == self._chunks:
            self._enough.set()

    def figures(self) -> tuple[float, float, float]:
        """Frames per second: of all; of the DiT and of VAE and pictures, each while it works."""
        assert self.last is not None
        # every counted chunk has as many frames as the last one
        per_second = (self._chunks - WARM_UP) * self.last.frames
        seconds = self.times[self._chunks - 1] - self.times[WARM_UP - 1]
        return per_second / seconds, self.last.dit_fps, self.last.vae_fps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", default="runs/demo/stage3-scd", help="what is served")
    parser.add_argument("--decoder", default="", help="a tiny decoder; empty: the VAE's own")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--chunks", type=int, default=30, help="measured in a round")
    parser.add_argument("--rounds", type=int, default=5, help="of either kind")
    args = parser.parse_args()
    maker, _ = open_maker(ServeConfig(args.checkpoint, decoder=args.decoder, dtype=args.dtype))
    results: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for _ in range(args.rounds):
        for overlap, values in results.items():
            values.append(Round(replace(maker, overlap=overlap), args.chunks).figures())
    names = ("fps", "dit_fps", "vae_fps")
    medians = {
        "overlap" if overlap else "one thread": {
            name: round(statistics.median(column), 2)
            for name, column in zip(names, zip(*values, strict=True), strict=True)
        }
        for overlap, values in results.items()
    }
    codecs: tuple[Codec, ...] = ("jpeg", "h264")
    rounds = {codec: Round(maker, args.chunks, codec) for codec in codecs}
    report = {
        **medians,
        "ratio": round(medians["overlap"]["fps"] / medians["one thread"]["fps"], 3),
        "rounds": args.rounds,
        "size": [maker.shape.pixel_height, maker.shape.pixel_width],
        "bytes_per_frame": {codec: round(r.bytes / r.frames) for codec, r in rounds.items()},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    exit_on_user_error(main)
