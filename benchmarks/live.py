"""What `scd serve` does on this machine: how fast its page plays, whether memory grows, and how the
page looks.

    python benchmarks/live.py runs/demo/stage3-scd --part speed --out docs/results/live.json
    python benchmarks/live.py runs/demo/stage3-scd --part memory --minutes 60 \\
        --out docs/results/live.json
    python benchmarks/live.py runs/demo/stage3-scd --part page --minutes 10 --bound 100 \\
        --out docs/results/live.json
    python benchmarks/live.py runs/demo/stage3-scd --part camera --out docs/results/live.json
    python benchmarks/live.py runs/demo/stage3-scd --part screenshots --out docs/figures

Each starts the command as one types it, on a free port. `speed`: a headless Chromium plays, starts
anew and changes the prompt, then a client without a page takes frames as fast as they come; both
once more with `--decoder`. `camera`: the browser's fake camera instead, at its own rate. Both need
an idle machine. `memory`: a client without a page starts clips, changes prompts, pauses, downloads,
sends pictures and a camera's frames, leaves and comes back, and the resident memory of all of the
server's processes must not grow by more than `--bound` (exit code 1). `page`: the same of the page.
Figures are added to the JSON file `--out`, by part, and printed as the table of the docs.
`screenshots`: webp files of the page while it plays, in the folder `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any

import psutil
from PIL import Image

from scd_sf.config import HelpFormatter
from scd_sf.files import read_json, write_json
from scd_sf.tools.serve.camera import HEAD, MARK
from scd_sf.types import UserError, exit_on_user_error, say

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROMPTS = (
    "forward: moving on and on through green grass and old stones at night",
    "left: the camera keeps turning left around a large room with round red lights above",
    "right: the camera keeps turning right around an open grey court ringed by a tan wall",
    "right walk: the camera turns right in a dark green meadow under a night sky",
)
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FAKE_CAMERA = (
    "--use-fake-device-for-media-stream=fps=60",
    "--use-fake-ui-for-media-stream",
)
REFRESH = 1 / 60  # seconds between two pictures of a screen
MIB = 2**20
SAMPLE = 5.0  # seconds between two samples of memory
# Every frame that is shown, and the last key that was pressed, by the page's own clock.
WATCH = """
window.shown = []; window.pressed = 0;
new MutationObserver(() => window.shown.push([Number(document.body.dataset.frame), performance.now()]))
  .observe(document, { attributes: true, subtree: true, attributeFilter: ["data-frame"] });
document.addEventListener("keydown", () => { window.pressed = performance.now(); }, true);
"""
# When each frame of the camera is sent, and when the chunks that are made from them come.
FILM = """
window.filmed = {}; window.chunks = [];
const plainSend = WebSocket.prototype.send, sockets = new WeakSet();
WebSocket.prototype.send = function (data) {
  if (!sockets.has(this)) {
    sockets.add(this);
    this.addEventListener("message", ({ data }) => {
      if (typeof data !== "string" || !data.includes('"camera"')) return;
      const { type, first, frames, camera } = JSON.parse(data);
      if (type === "chunk") window.chunks.push([first + frames - 1, camera, performance.now()]);
    });
  }
  if (data instanceof Uint8Array) window.filmed[new DataView(data.buffer).getUint32(4)] = performance.now();
  return plainSend.call(this, data);
};
"""
FRAME = "Number(document.body.dataset.frame)"
SAID = "document.getElementById('said').textContent"
READY = "document.body.dataset.ready === 'true'"


# ---------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Served:
    """A running `scd serve`: its process, and the port of 127.0.0.1 on which it listens."""

    process: psutil.Process
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextlib.contextmanager
def served(checkpoint: str, fps: int, decoder: str = "", overlap: str = "auto") -> Iterator[Served]:
    """The command as one types it, until the end of the ``with``, where it must end by Ctrl-C.
    UserError: it does not start, or does not end."""
    command = [sys.executable, "-m", "scd_sf.cli", "serve", checkpoint, "--fps", str(fps)]
    command += ["--port", "0", "--overlap", overlap, *(["--decoder", decoder] if decoder else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = next((line for line in process.stdout if line.startswith("open ")), "")
        port = re.search(r":(\d+)/", address)
        if port is None:
            raise UserError(f"scd serve {checkpoint}: it did not start; see above")
        yield Served(psutil.Process(process.pid), int(port[1]))
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise UserError("scd serve did not end within 60 s of Ctrl-C") from error


# ------------------------------------------------------------------------------ without a page


@dataclass
class Client:
    """What a page says and hears, without a page: every frame counts as shown when it is there.
    Counts what it has done."""

    port: int
    patience: float = 120  # seconds for a message
    counts: dict[str, int] = field(default_factory=dict)
    welcome: dict[str, Any] = field(default_factory=dict)  # what the server said first

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    @contextlib.contextmanager
    def visit(self, *, watch: bool = False, goodbye: bool = True) -> Iterator[Any]:
        """A connection that has the seat, or watches along. Without ``goodbye`` it is cut at the
        end."""
        from websockets.sync.client import connect
        from websockets.typing import Origin

        url, origin = f"ws://127.0.0.1:{self.port}/live", Origin(f"http://127.0.0.1:{self.port}")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with connect(url, origin=origin, compression=None, max_size=None) as socket:
                self.say(socket, type="hello", token="", watch=watch)
                self.welcome = json.loads(socket.recv(timeout=60))
                if self.welcome["type"] == "busy":
                    time.sleep(0.1)
                    continue
                self.count("connections")
                yield socket
                if not goodbye:
                    socket.socket.shutdown(SHUT_RDWR)
                return
        raise UserError("the seat stayed taken for 60 s")

    def say(self, socket: Any, **message: object) -> None:
        socket.send(json.dumps(message))

    def take(self, socket: Any) -> str:
        """The next message with what belongs to it; a chunk is acknowledged. Returns its type.
        UserError: the server refused something."""
        message = json.loads(socket.recv(timeout=self.patience))
        if message["type"] == "chunk":
            for _ in range(message["frames"]):
                socket.recv(timeout=self.patience)
            self.say(socket, type="shown", chunk=message["chunk"])
            self.count("chunks")
            self.count("frames", message["frames"])
        elif message["type"] == "file":
            if len(socket.recv(timeout=self.patience)) != message["bytes"]:
                raise UserError(f"{message['name']} has another size than the server said")
            self.count("downloads")
        elif message["type"] == "error":
            raise UserError(f"the server refused: {message['message']}")
        return str(message["type"])

    def take_until(self, socket: Any, kind: str) -> None:
        """All messages up to the first of this type."""
        while self.take(socket) != kind:
            pass

    def film(self, socket: Any, frames: int) -> None:
        """So many frames of a camera, at the model's rate: of faster ones the server leaves some out."""
        for _ in range(frames):
            time.sleep(1 / self.welcome["fps"])
            number = self.counts.get("camera frames", 0)
            file = io.BytesIO()
            size = (self.welcome["width"], self.welcome["height"])
            Image.new("RGB", size, (number % 256, 128, 0)).save(file, "JPEG")
            socket.send(HEAD.pack(MARK, number) + file.getvalue())
            self.count("camera frames")

    def clip(
        self, socket: Any, chunks: int, end: float, *, picture: bool = False, camera: bool = False
    ) -> None:
        """A clip of so many chunks, or up to ``end`` of the monotonic clock: another prompt every
        10 of them, a download every 250, a pause every 400. Clips are H.264 and JPEGs in turn, where
        the server has both."""
        number = self.counts.get("clips", 0)
        prompt = PROMPTS[number % len(PROMPTS)]
        if self.welcome["h264"]:
            self.say(socket, type="codec", codec=("jpeg", "h264")[number % 2])
        start = {"type": "start", "prompt": prompt, "seed": number, "picture": picture}
        if camera:
            start |= {"camera": True, "strength": self.welcome["levels"][1]}
        self.say(socket, **start)
        self.take_until(socket, "started")
        self.count("clips")
        if camera:
            self.film(socket, 12)
        for chunk in range(1, chunks + 1):
            before = self.counts.get("frames", 0)
            self.take_until(socket, "chunk")
            if camera:  # as many as the next one takes
                self.film(socket, self.counts["frames"] - before + (3 if chunk == 1 else 0))
            if time.monotonic() > end:
                return
            if chunk % 10 == 0:
                self.say(socket, type="prompt", prompt=PROMPTS[chunk // 10 % len(PROMPTS)])
                self.count("changes")
            if chunk % 250 == 0:
                self.say(socket, type="download")
                self.take_until(socket, "file")
            if chunk % 400 == 0:
                self.say(socket, type="pause", on=True)
                time.sleep(1)
                self.say(socket, type="pause", on=False)
                self.count("pauses")

    def watch(self, is_over: Callable[[], bool]) -> None:
        """Watch along, for a minute at a time."""
        from websockets.exceptions import ConnectionClosed

        while not is_over():
            end = time.monotonic() + 60
            with (
                contextlib.suppress(ConnectionClosed, TimeoutError),
                self.visit(watch=True) as socket,
            ):
                while time.monotonic() < end and not is_over():
                    self.take(socket)


def picture_file() -> bytes:
    """A start picture as one sends it."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "PNG")
    return file.getvalue()


def full_speed(server: Served, seconds: float) -> float:
    """Frames per second that a client without a page is sent, after two seconds."""
    client = Client(server.port)
    with client.visit() as socket:
        client.say(socket, type="start", prompt=PROMPTS[0], seed=0)
        client.take_until(socket, "started")
        first, frames = 0.0, 0
        start = time.monotonic()
        while (now := time.monotonic()) < start + 2 + seconds:
            if not first and now > start + 2:
                first, frames = now, client.counts["frames"]
            client.take_until(socket, "chunk")
        return (client.counts["frames"] - frames) / (now - first)


# -------------------------------------------------------------------------------------- memory


def resident_mib(process: psutil.Process) -> float:
    """Of a process and all below it."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total / MIB


def slope_per_hour(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Of a line through the points, by least squares."""
    return 3600 * statistics.linear_regression(seconds, values).slope


@dataclass
class Samples:
    """Named values over time. ``warm_up``: seconds that do not count."""

    warm_up: float
    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, **values: float) -> None:
        self.seconds.append(seconds)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each value after the warm-up: first, last, least, most, and its slope an hour. UserError:
        too few."""
        first = sum(second < self.warm_up for second in self.seconds)
        if len(self.seconds) - first < 10:
            raise UserError("fewer than 10 samples after the warm-up; give more --minutes")
        rows = {}
        for name, values in self.values.items():
            kept = values[first:]
            figures = {"first": kept[0], "last": kept[-1], "least": min(kept), "most": max(kept)}
            figures["per_hour"] = slope_per_hour(self.seconds[first:], kept)
            rows[name] = {key: round(value, 2) for key, value in figures.items()}
        return rows


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """The server's memory while a client does all that a page can do."""
    duration = 60 * options.minutes
    samples = Samples(duration / 4)
    with served(options.checkpoint, options.fps) as server:
        client, over = Client(server.port), threading.Event()
        start = time.monotonic()

        def sample() -> None:
            while not over.wait(SAMPLE):
                process = server.process
                samples.add(
                    time.monotonic() - start,
                    resident_mib=resident_mib(process),
                    files=process.num_fds(),
                    threads=process.num_threads(),
                )
                if len(samples.seconds) % 60 == 0:
                    now = samples.values["resident_mib"][-1]
                    say(f"{samples.seconds[-1] / 60:.0f} min: {now:.1f} MiB, {client.counts}")

        watcher = Client(server.port, patience=5)
        threads = [
            threading.Thread(target=sample, daemon=True),
            threading.Thread(target=watcher.watch, args=[over.is_set], daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            end = start + duration
            while time.monotonic() < end:
                goodbye = client.counts.get("connections", 0) % 2 == 0
                with client.visit(goodbye=goodbye) as socket:
                    for chunks in (5, 50, 1000):
                        client.clip(socket, chunks, end)
                    socket.send(picture_file())
                    client.take_until(socket, "picture")
                    client.count("pictures")
                    client.clip(socket, 50, end, picture=True)
                    client.clip(socket, 50, end, camera=True)
        finally:
            over.set()
            for thread in threads:
                thread.join(130)
    return {"minutes": options.minutes, "warm_up_minutes": options.minutes / 4} | {
        "bound_mib_per_hour": options.bound,
        "done": client.counts,
        "watched_along": watcher.counts,
        **samples.summary(),
        "resident_mib_by_minute": [round(v, 1) for v in samples.values["resident_mib"][::12]],
    }


def measure_page(options: argparse.Namespace) -> dict[str, Any]:
    """The page's memory while it plays, changes the prompt every 10 seconds, starts anew every
    minute and downloads every two."""
    duration = 60 * options.minutes
    samples = Samples(duration / 4)
    with served(options.checkpoint, options.fps) as server, chromium(options.chromium) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        devtools, machine = page.context.new_cdp_session(page), browser.new_browser_cdp_session()
        devtools.send("Performance.enable")
        page.goto(server.url)
        until(page, READY)
        start_clip(page, PROMPTS[0])
        start, ticks, frames = time.monotonic(), 0, 0
        while (now := time.monotonic() - start) < duration:
            page.wait_for_timeout(1000 * SAMPLE)
            ticks += 1
            frame = page.evaluate(FRAME)
            if ticks % 12 == 0:
                frames += frame
                page.locator("#start").click()
            elif ticks % 2 == 0:
                change_prompt(page, PROMPTS[ticks // 2 % len(PROMPTS)])
            if ticks % 24 == 18:
                with page.expect_download() as download:
                    page.locator("#download").click()
                download.value.delete()
            renderers = [
                one["id"]
                for one in machine.send("SystemInfo.getProcessInfo")["processInfo"]
                if one["type"] == "renderer"
            ]
            resident = sum(resident_mib(psutil.Process(pid)) for pid in renderers)
            devtools.send("HeapProfiler.collectGarbage")
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            known = {one["name"]: one["value"] for one in metrics}
            samples.add(
                now,
                resident_mib=resident,
                heap_mib=known["JSHeapUsedSize"] / MIB,
                nodes=known["Nodes"],
                listeners=known["JSEventListeners"],
            )
        frames += page.evaluate(FRAME)
    return {"minutes": options.minutes, "warm_up_minutes": options.minutes / 4} | {
        "bound_mib_per_hour": options.bound,
        "frames": frames,
        **samples.summary(),
        "resident_mib_by_minute": [round(v, 1) for v in samples.values["resident_mib"][::12]],
    }


# ------------------------------------------------------------------------------------- the page


@contextlib.contextmanager
def chromium(program: str, more: Sequence[str] = ()) -> Iterator[Browser]:
    """The system's own, headless, with ``more`` options. UserError: there is none."""
    from playwright.sync_api import sync_playwright

    path = program or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise UserError("no Chromium: apt-get install -y chromium, or give --chromium PROGRAM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, headless=True, args=[*CHROMIUM, *more]
        )
        try:
            yield browser
        finally:
            browser.close()


def until(page: Page, script: str, seconds: float = 60) -> None:
    """Asked again and again: the page's policy forbids Playwright's own waiting. UserError: never."""
    end = time.monotonic() + seconds
    while not page.evaluate(script):
        if time.monotonic() > end:
            raise UserError(
                f"the page: within {seconds:.0f} s never {script}: {page.evaluate(SAID)}"
            )
        page.wait_for_timeout(20)


def start_clip(page: Page, prompt: str) -> None:
    """By Enter where nothing plays yet; returns when its tenth frame is shown."""
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Enter")
    until(page, f"{FRAME} >= 10")


def change_prompt(page: Page, prompt: str) -> int:
    """By Enter; returns the frame from which the page says that it holds."""
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Enter")
    until(page, f"{SAID}.startsWith('from frame') && {SAID}.endsWith({json.dumps(prompt)})")
    return int(page.evaluate(SAID).split()[2].rstrip(":"))


def shown_at(page: Page, reached: Callable[[int], bool]) -> float:
    """Seconds from the last key to the first frame after it that is ``reached``."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pressed, shown = page.evaluate("[window.pressed, window.shown]")
        for frame, at in shown:
            if at > pressed and reached(frame):
                return float(at - pressed) / 1000
        page.wait_for_timeout(20)
    raise UserError("the page: the frame was not shown within 60 s")


def late_share(milliseconds: Sequence[float], fps: float) -> float:
    """Share of frames that came later after the one before than a frame and a refresh of the
    screen take."""
    steps = [b - a for a, b in itertools.pairwise(milliseconds)]
    return sum(step > 1000 * (1 / fps + REFRESH) + 1 for step in steps) / len(steps)


def played(page: Page, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one server as its page shows and tells them."""
    until(page, READY)
    page.locator("#prompt").fill(PROMPTS[0])
    page.keyboard.press("Enter")
    starts = [shown_at(page, lambda frame: frame == 0)]
    for _ in range(options.repeats):
        page.wait_for_timeout(1000)
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("r")
        starts.append(shown_at(page, lambda frame: frame == 0))
    page.wait_for_timeout(3000)
    page.evaluate("window.shown.length = 0")
    dit, vae = [], []
    for _ in range(max(1, round(options.seconds))):
        page.wait_for_timeout(1000)
        told = "['dit-fps', 'vae-fps'].map((id) => Number(document.getElementById(id).textContent))"
        speeds = page.evaluate(told)
        dit.append(speeds[0])
        vae.append(speeds[1])
    shown = page.evaluate("window.shown")
    times = [at for _, at in shown]
    numbers = [frame for frame, _ in shown]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UserError("the page left frames out, or showed them in another order")
    switches = []
    for number in range(2 * options.repeats):
        page.wait_for_timeout(1500)
        page.evaluate("window.shown.length = 0")
        first = change_prompt(page, PROMPTS[(number + 1) % len(PROMPTS)])
        switches.append(shown_at(page, lambda frame, first=first: frame >= first))  # type: ignore[misc]
    return {
        "dit_fps": round(statistics.median(dit), 1),
        "vae_fps": round(statistics.median(vae), 1),
        "page_fps": round(1000 * (len(times) - 1) / (times[-1] - times[0]), 2),
        "late_share": round(late_share(times, options.fps), 4),
        "frames": len(times),
        "first_start_seconds": round(starts[0], 3),
        "start_seconds": [round(value, 3) for value in starts[1:]],
        "switch_seconds": [round(value, 3) for value in switches],
    }


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Rows by what decodes: the VAE, and the tiny decoder where there is one."""
    figures: dict[str, Any] = {"fps": options.fps, "seconds": options.seconds}
    for name, decoder in {"vae": "", "decoder": options.decoder}.items():
        if name == "decoder" and not decoder:
            continue
        with served(options.checkpoint, options.fps, decoder, options.overlap) as server:
            with chromium(options.chromium) as browser:
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                page.add_init_script(WATCH)
                page.goto(server.url)
                row = played(page, options)
            row["full_speed_fps"] = round(full_speed(server, options.seconds), 1)
        figures[name] = row
        say(f"{name}: {row}")
    return figures


def measure_camera(options: argparse.Namespace) -> dict[str, Any]:
    """How fast a clip from the camera plays, and how old it is: from the sending of a chunk's newest
    camera frame until the chunk comes, and until its last frame is shown."""
    with (
        served(options.checkpoint, options.fps, options.decoder, options.overlap) as server,
        chromium(options.chromium, FAKE_CAMERA) as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.add_init_script(WATCH + FILM)
        page.goto(server.url)
        until(page, READY)
        page.locator("#camera").click()
        until(page, f"{SAID}.startsWith('The next clip is made from the camera')")
        page.locator("#prompt").fill(PROMPTS[0])
        page.locator("#start").click()
        until(page, f"{FRAME} >= 3 * {options.fps}")
        page.evaluate("window.shown.length = window.chunks.length = 0")
        sent = page.evaluate("captured")
        page.wait_for_timeout(1000 * options.seconds)
        sent = page.evaluate("captured") - sent
        strength = page.evaluate("strength()")
        shown, chunks, filmed = page.evaluate("[window.shown, window.chunks, window.filmed]")
    times = [at for _, at in shown]
    when = dict(shown)
    to_page = [at - filmed[str(camera)] for _, camera, at in chunks]
    to_screen = [when[last] - filmed[str(camera)] for last, camera, _ in chunks if last in when]
    return {
        "fps": options.fps,
        "seconds": options.seconds,
        "strength": strength,
        "camera_fps": round(sent / options.seconds, 2),
        "page_fps": round(1000 * (len(times) - 1) / (times[-1] - times[0]), 2),
        "late_share": round(late_share(times, options.fps), 4),
        "to_page_ms": [round(statistics.median(to_page)), round(max(to_page))],
        "to_screen_ms": [round(statistics.median(to_screen)), round(max(to_screen))],
    }


SCREENSHOTS: dict[str, dict[str, Any]] = {
    "live_light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "live_dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "live_phone": {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "light",
        "has_touch": True,
    },
}


def take_screenshots(options: argparse.Namespace) -> None:
    """One for each size and colour, while the clip plays."""
    options.out.mkdir(parents=True, exist_ok=True)
    with served(options.checkpoint, options.fps) as server, chromium(options.chromium) as browser:
        for prompt, (name, look) in zip(PROMPTS, SCREENSHOTS.items(), strict=False):
            context = browser.new_context(**look)
            page = context.new_page()
            page.goto(server.url)
            until(page, READY)
            start_clip(page, prompt)
            until(page, f"{FRAME} >= 90")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            path = options.out / f"{name}.webp"
            picture.save(path, quality=80, method=6)
            say(f"{path}: {path.stat().st_size} bytes")
            context.close()


# --------------------------------------------------------------------------------------- tables


def table(part: str, figures: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    if part == "speed":
        lines = [
            "| decoded by | FPS DiT | FPS VAE and pictures | without a page | page, "
            f"{figures['fps']} asked | late frames | first start | start | new prompt, median / worst |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, words in (("vae", "the VAE"), ("decoder", "a tiny decoder")):
            if name in figures:
                row = figures[name]
                start, switch = row["start_seconds"], row["switch_seconds"]
                lines.append(
                    f"| {words} | {row['dit_fps']} | {row['vae_fps']} "
                    f"| {row['full_speed_fps']} | {row['page_fps']} | {100 * row['late_share']:.1f} % "
                    f"| {row['first_start_seconds']:.2f} s | {statistics.median(start):.2f} s "
                    f"| {statistics.median(switch):.2f} / {max(switch):.2f} s |"
                )
        return lines
    if part == "camera":
        lines = [
            f"| strength | camera, frames a second | page, {figures['fps']} asked | late frames "
            "| sent to page, median / worst | sent to screen |",
            "|---|---|---|---|---|---|",
        ]
        to_page, to_screen = figures["to_page_ms"], figures["to_screen_ms"]
        lines.append(
            f"| {figures['strength']} | {figures['camera_fps']} | {figures['page_fps']} "
            f"| {100 * figures['late_share']:.1f} % | {to_page[0]} / {to_page[1]} ms "
            f"| {to_screen[0]} / {to_screen[1]} ms |"
        )
        return lines
    lines = ["| | first | last | least | most | slope, an hour |", "|---|---|---|---|---|---|"]
    names = {
        "resident_mib": "resident, MiB",
        "heap_mib": "JavaScript heap, MiB",
        "files": "open files",
        "threads": "threads",
        "nodes": "DOM nodes",
        "listeners": "listeners",
    }
    for name, words in names.items():
        if name in figures:
            row = figures[name]
            cells = [f"{row[key]:.1f}" for key in ("first", "last", "least", "most")]
            lines.append(f"| {words} | {' | '.join(cells)} | {row['per_hour']:+.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", help="what scd serve is given")
    parts = ("speed", "camera", "memory", "page", "screenshots")
    parser.add_argument("--part", choices=parts, required=True, help="what is done")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, or folder of pictures")
    parser.add_argument("--fps", type=int, default=35, help="frames per second of the page")
    parser.add_argument(
        "--overlap", default="auto", help="of scd serve: auto, on, off (speed, camera)"
    )
    parser.add_argument(
        "--decoder", default="", help="a tiny decoder, measured too (speed, camera)"
    )
    parser.add_argument("--seconds", type=float, default=30, help="of steady play (speed, camera)")
    parser.add_argument("--repeats", type=int, default=5, help="starts; twice as many changes")
    parser.add_argument("--minutes", type=float, default=60, help="how long (memory, page)")
    parser.add_argument(
        "--bound", type=float, default=20, help="MiB an hour that are no growth, after a quarter"
    )
    parser.add_argument("--chromium", default="", help="the browser; empty: the one on PATH")
    options = parser.parse_args()
    if options.part == "screenshots":
        take_screenshots(options)
        return
    known = read_json(options.out, "give another --out") if options.out.exists() else {}
    measures = {
        "speed": measure_speed,
        "camera": measure_camera,
        "memory": measure_memory,
        "page": measure_page,
    }
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    figures = measures[options.part](options)
    date = datetime.date.today().isoformat()
    write_json(options.out, {**known, options.part: {"date": date, **machine, **figures}})
    print("\n".join(table(options.part, figures)))
    if options.part in ("memory", "page"):
        slope = figures["resident_mib"]["per_hour"]
        if slope > options.bound:
            say(f"resident memory grows by {slope:.1f} MiB an hour, more than {options.bound}")
            sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
