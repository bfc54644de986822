"""The second stage of the pipeline: what follows the DiT, in a thread of its own beside it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Job = Callable[[], None]


class Stage:
    """Does jobs one after the other in a thread of its own, while one more waits at most; without
    ``overlap`` in the thread that brings them. ``at_failure``: called in the stage's thread with
    what a job raised; no job is done after it."""

    def __init__(self, overlap: bool, at_failure: Callable[[BaseException], None]) -> None:
        self._at_failure = at_failure
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if overlap:
            self._thread = threading.Thread(target=self._run, name="scd serve: stage", daemon=True)

    def start(self) -> None:
        """Begin to wait for jobs."""
        if self._thread is not None:
            self._thread.start()

    def put(self, job: Job) -> None:
        """Returns when no other job waits. A stage that failed takes no job."""
        if self._thread is None:
            job()
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._is_closed)
            if not self._is_closed:
                self._jobs.append(job)
                self._changed.notify_all()

    def close(self) -> None:
        """Returns when all jobs are done and the thread has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException as error:
            with self._changed:
                self._is_closed = True
                self._jobs.clear()
                self._changed.notify_all()
            self._at_failure(error)
            raise

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            job = self._jobs.popleft() if self._jobs else None
            self._changed.notify_all()
            return job


class Streams:
    """CUDA streams for a thread that works beside another one, one for each GPU of ``devices``; on
    a CPU nothing."""

    def __init__(self, *devices: torch.device) -> None:
        streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]
        self._streams = {stream.device: stream for stream in streams}
        for device, stream in self._streams.items():
            # the weights may still be on their way
            stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def reading(self, tensor: Tensor, ready: Moment) -> Iterator[None]:
        """What the thread does inside runs on the streams, after ``ready``; the memory of
        ``tensor`` stays until it has run."""
        with ExitStack() as stack:
            for stream in self._streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            if ready.event is not None and tensor.device in self._streams:
                self._streams[tensor.device].wait_event(ready.event)
                tensor.record_stream(self._streams[tensor.device])
            yield


@dataclass(frozen=True)
class Moment:
    """How far a device's work had come. ``clock``: monotonic seconds of the call. ``event``: recorded
    on the thread's stream of a GPU; None on a CPU, whose work is done when a call returns."""

    clock: float
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Returns when the device has come so far."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds that the device took from an earlier moment; both were waited for."""
        if self.event is None or earlier.event is None:
            return self.clock - earlier.clock
        return float(earlier.event.elapsed_time(self.event)) / 1000


def moment(device: torch.device) -> Moment:
    """Now, on this thread's stream of the device."""
    if device.type != "cuda":
        return Moment(time.monotonic())
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return Moment(time.monotonic(), event)
