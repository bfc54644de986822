"""The page of ``scd serve`` in a real headless Chromium: it shows every frame in order, tells the
prompt that it switches to, survives a cut, and runs nothing foreign.

Needs Chromium (Debian: apt-get install chromium; elsewhere set CHROMIUM to the program).
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import serve_world
import torch
from browsers import QUIET, chromium
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from serve_world import TOKEN, Live, seated, until, wait_for_nobody

from scd_sf.generation.generate import as_uint8, generate
from scd_sf.tools.serve.pictures import H264, jpeg

pytestmark = [pytest.mark.slow, pytest.mark.browser]
HOSTILE = "</p><img src=x onerror='window.hit = 1'><script>window.hit = 1</script>"
SAID = "document.getElementById('said').textContent"
COLOUR = "getComputedStyle(document.getElementById('said')).color"
MESSAGE = "document.getElementById('message').textContent"
FRAME = "Number(document.body.dataset.frame)"
CODEC = "document.getElementById('codec').textContent"
HAS_H264 = """VideoDecoder.isConfigSupported(
  { codec: "avc1.42c00a", codedWidth: 32, codedHeight: 32 }).then((answer) => answer.supported)"""
# what a browser lacks, or does from the seventh picture on, and why the page then takes JPEGs
NO_DECODER = "this browser does not decode H.264"
WITHOUT_H264 = {
    "delete window.VideoDecoder": "this browser has no VideoDecoder",
    "VideoDecoder.isConfigSupported = async () => ({ supported: false })": NO_DECODER,
}
FAULTS = {"throw new Error('it broke')": "it broke", "return": "the decoder holds pictures back"}
FAULT = """
  const decode = VideoDecoder.prototype.decode;
  let count = 0;
  VideoDecoder.prototype.decode = function (picture) {
    if (++count > 6) FAULT;
    decode.call(this, picture);
  };
"""
WATCH = """
  window.frames_shown = [];
  new MutationObserver(() => window.frames_shown.push(Number(document.body.dataset.frame)))
    .observe(document, { attributes: true, subtree: true, attributeFilter: ["data-frame"] });
  window.messages = [];
  document.addEventListener("DOMContentLoaded", () => {
    const message = document.getElementById("message");
    new MutationObserver(() => window.messages.push(message.textContent))
      .observe(message, { childList: true, characterData: true, subtree: true });
  });
"""
LOST = "messages.some((said) => said.startsWith('The connection is gone'))"


NOT_SECURE = "Object.defineProperty(window, 'isSecureContext', { value: false });"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve_world.live(tmp_path_factory.mktemp("live")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium(os.environ.get("CHROMIUM"), os.environ.get("PATH"))
    with sync_playwright() as playwright:
        fake = "--use-fake-device-for-media-stream"
        browser = playwright.chromium.launch(
            executable_path=program, headless=True, args=[*QUIET, fake]
        )
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def pages(browser: Browser, live: Live) -> Iterator[None]:
    """No page of a test keeps the seat from the next one."""
    yield
    for context in browser.contexts:
        context.close()
    wait_for_nobody(live)


class Visit:
    """A page of the server with all that it complained about or asked for."""

    def __init__(
        self,
        browser: Browser,
        url: str,
        width: int = 1200,
        height: int = 900,
        script: str = "",
        camera: bool = True,
    ) -> None:
        """``camera``: what its user says where the browser asks for it."""
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, permissions=["camera"] if camera else []
        )
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # milliseconds
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.add_init_script(WATCH + script)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def until(self, script: str, seconds: float = 60.0) -> None:
        """Asked again and again: the page's policy forbids the eval of Playwright's own waiting."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"never became true: {script}; {self.complaints}"
            self.page.wait_for_timeout(30)

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


def test_the_page_plays_what_is_made(live: Live, browser: Browser, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{live.port}/"
    visit = Visit(browser, url)
    page = visit.page
    visit.until("document.body.dataset.ready === 'true'")
    page.locator("#prompt").fill(HOSTILE)
    page.keyboard.press("Enter")
    visit.until(f"{FRAME} >= 20")
    assert visit.ask(SAID) == f"seed 0: {HOSTILE}" and visit.ask("window.hit") is None
    page.locator("#prompt").fill("right in hall")
    page.keyboard.press("Enter")
    visit.until(f"{SAID}.startsWith('from frame ')")
    switch = int(visit.ask(SAID).split()[2].rstrip(":"))
    assert switch > 20 and (switch - 1) % 4 == 0
    visit.until(f"{FRAME} >= {switch + 8}")
    page.locator("h1, #figures").first.click()
    page.keyboard.press("Space")
    visit.until("document.getElementById('pause').textContent === 'Go on'")
    page.wait_for_timeout(300)
    shown = visit.ask("window.frames_shown")
    assert len(shown) > 20 and shown == list(range(len(shown))), "every frame, in order, once"
    page.wait_for_timeout(300)
    assert visit.ask("window.frames_shown.length") == len(shown), "paused"
    picture = Image.open(io.BytesIO(page.locator("#picture").screenshot())).convert("RGB")
    assert np.asarray(picture).std() > 1, "a picture is on the canvas"
    assert all(
        visit.ask(f"Number.parseFloat(document.getElementById('{name}').textContent)") > 0
        for name in ("dit-fps", "vae-fps", "first")
    )
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "live.zip")
    assert download.value.suggested_filename == "scd-live-0.zip"
    assert (tmp_path / "live.zip").stat().st_size > 500
    visit.until(f"{SAID}.startsWith('Downloaded')")
    colour = visit.ask(COLOUR)
    start = tmp_path / "start.png"
    start.write_bytes(b"no picture")
    page.locator("#file").set_input_files(start)
    visit.until(f"{SAID}.startsWith('the picture cannot be read')")
    assert visit.ask(COLOUR) != colour, "an error looks like one"
    assert page.locator("#file").input_value() == "", "nor does the page say that it is chosen"
    Image.new("RGB", (64, 64), (250, 10, 10)).save(start)
    page.locator("#file").set_input_files(start)
    assert page.locator("#start").is_disabled() or visit.ask("hasPicture"), "never without it"
    visit.until(f"{SAID}.includes('begins with the picture')")
    assert visit.ask(COLOUR) == colour
    visit.ask("window.frames_shown.length = 0")
    page.locator("#seed").fill("5")
    page.locator("#start").click()
    visit.until(f"{SAID} === 'seed 5: right in hall'")
    visit.until("window.frames_shown.length > 8")
    shown = visit.ask("window.frames_shown")
    assert shown[:9] == list(range(9))
    own = (url, url.replace("http", "ws"), "blob:", "data:")
    assert visit.complaints == [] and [u for u in visit.requests if not u.startswith(own)] == []
    visit.context.close()


def test_a_camera(live: Live, browser: Browser) -> None:
    """The browser's own fake camera: its frames become chunks, strength and prompt change on the way,
    and without it the clip goes on."""
    visit = Visit(browser, f"http://127.0.0.1:{live.port}/")
    visit.until("document.body.dataset.ready === 'true'")
    page, text = visit.page, "document.getElementById('{}').textContent"
    assert visit.ask("document.getElementById('view').hidden")
    page.locator("#camera").click()
    visit.until(f"{SAID}.startsWith('The next clip is made from the camera')")
    assert "No student is trained for this" in visit.ask(SAID)
    assert visit.ask("document.getElementById('view').videoWidth") > 0
    assert visit.ask(text.format("level")) == "0.8333"
    assert page.locator("#strength").get_attribute("aria-valuetext") == "0.8333"
    page.locator("#prompt").fill("left in meadow")
    page.locator("#start").click()
    visit.until(f"{FRAME} >= 12")
    visit.until(f"{text.format('lag')}.endsWith(' ms')")
    seat = live.generator._seat
    assert seat is not None and seat.clip is not None and seat.strength == 0.8333
    source = seat.clip.camera
    assert source is not None and source.is_on
    page.locator("#strength").press("ArrowRight")
    visit.until(f"{text.format('level')} === '1'")
    assert page.locator("#strength").get_attribute("aria-valuetext") == "1"
    until(lambda: seat.strength == 1)
    page.locator("#prompt").fill("right in hall")
    page.keyboard.press("Enter")
    visit.until(f"{SAID}.startsWith('from frame ')")
    page.locator("#pause").click()
    visit.until("!isCapturing")
    sent = visit.ask("captured")
    page.wait_for_timeout(300)
    assert sent > 12 and visit.ask("captured") == sent, "none is sent while it is paused"
    page.locator("#pause").click()
    shown = visit.ask(FRAME)
    visit.until(f"{FRAME} >= {shown + 8}")
    page.locator("#camera").click()
    until(lambda: not source.is_on)
    shown = visit.ask(FRAME)
    visit.until(f"{FRAME} >= {shown + 12}")
    assert visit.ask("document.getElementById('view').srcObject") is None
    page.locator("#start").click()
    until(lambda: seat.clip is not None and seat.clip.camera is None)
    visit.until(f"{SAID} === 'seed 0: right in hall'")
    frames = visit.ask("window.frames_shown")
    assert frames[:13] == list(range(13))
    assert visit.complaints == []
    visit.context.close()
    plain = Visit(browser, f"http://127.0.0.1:{live.port}/", script=NOT_SECURE)
    plain.until("document.body.dataset.ready === 'true'")
    plain.page.locator("#camera").click()
    plain.until(f"{SAID}.startsWith('Browsers give cameras to secure pages alone')")
    plain.context.close()
    refused = Visit(browser, f"http://127.0.0.1:{live.port}/", camera=False)
    refused.until("document.body.dataset.ready === 'true'", 30)
    refused.page.locator("#camera").click()
    refused.until(
        f"{SAID}.startsWith('The camera cannot be used: Permission denied; allow it for this page')"
    )
    assert refused.ask("document.getElementById('view').hidden")
    refused.page.locator("#start").click()  # and it plays without one
    refused.until(f"{FRAME} >= 4")
    assert refused.ask("camera") is None and refused.complaints == []
    refused.context.close()


def test_busy_a_cut_and_a_phone(live: Live, browser: Browser) -> None:
    """A page that finds the seat taken says so and gets it later; one whose connection is cut plays
    again; at phone size nothing is wider than the screen."""
    url = f"http://127.0.0.1:{live.port}/"
    other = seated(live)
    visit = Visit(browser, url, 390, 844)
    visit.until(f"{MESSAGE}.startsWith('Somebody else')")
    assert visit.ask("document.documentElement.scrollWidth <= window.innerWidth")
    other.socket.close()
    visit.until("document.body.dataset.ready === 'true'")
    visit.page.locator("#start").click()
    visit.until(f"{FRAME} >= 4")
    visit.ask("socket.close()")
    visit.until(f"{LOST} && {MESSAGE}.startsWith('Type a prompt')")
    visit.ask("window.frames_shown.length = 0")
    visit.page.locator("#start").click()
    visit.until("window.frames_shown.length > 4 && window.frames_shown[0] === 0")
    visit.context.close()


def test_the_seat_is_taken_during_a_cut(live: Live, browser: Browser) -> None:
    """The viewer who was cut is told so and waits; who watched along plays; then the other way
    round, by itself."""
    url = f"http://127.0.0.1:{live.port}/"
    cut, other = Visit(browser, url), Visit(browser, url)
    cut.until("document.body.dataset.ready === 'true'")
    cut.page.locator("#start").click()
    cut.until(f"{FRAME} >= 4")
    other.until(f"{MESSAGE}.startsWith('Somebody else has the seat')")
    other.page.locator("#watch").click()
    other.until(f"{FRAME} >= 4")
    cut.ask("waits[0] = 1e5, waits[3] = 2, socket.close()")  # until it is told to
    other.until("!document.getElementById('take').hidden")
    assert other.ask(SAID).startswith("Nobody has the seat")
    other.page.locator("#take").click()
    other.until("document.body.dataset.ready === 'true'")
    cut.ask("connect()")
    cut.until(f"{MESSAGE}.startsWith('The seat is taken: by somebody else')")
    assert cut.page.locator("#start").is_disabled() and cut.page.locator("#watch").is_visible()
    other.ask("window.frames_shown.length = 0")
    other.page.locator("#start").click()
    other.until("window.frames_shown.length > 4 && window.frames_shown[0] === 0")
    assert cut.ask("ready") is None
    until(lambda: len(live.generator.audience) == 0)
    other.context.close()
    cut.until(f"{MESSAGE} === 'Type a prompt and press Start.'")
    cut.ask("window.frames_shown.length = 0")
    cut.page.locator("#start").click()
    cut.until("window.frames_shown.length > 4 && window.frames_shown[0] === 0")
    assert cut.complaints == other.complaints == []


def test_a_key_that_is_held_asks_once(live: Live, browser: Browser) -> None:
    visit = Visit(browser, f"http://127.0.0.1:{live.port}/")
    visit.until("document.body.dataset.ready === 'true'")
    visit.ask(
        "(() => { const plain = send; window.sent = []; "
        "send = (one) => { sent.push(one.type); plain(one); }; })()"
    )
    keyboard, asked = visit.page.keyboard, "window.sent.filter((type) => type === '{}').length"

    def hold(key: str) -> None:
        for _ in range(5):
            keyboard.down(key)
        keyboard.up(key)

    hold("r")
    visit.until(f"{FRAME} >= 4")
    assert visit.ask(asked.format("start")) == 1
    hold(" ")
    assert visit.ask(asked.format("pause")) == 1 and visit.ask("paused")
    visit.page.locator("#prompt").focus()
    hold("Enter")
    assert visit.ask(asked.format("prompt")) == 1
    visit.page.locator("#start").focus()
    hold("Enter")
    assert visit.ask(asked.format("start")) == 2


def frames_of(live: Live, prompt: str, seed: int, last: int) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 of generate(), up to number ``last``."""
    maker, latent_frames = live.maker, (last + 3) // 4 + 1
    parts = generate(
        maker.student,
        maker.vae,
        maker.encode(prompt),
        [seed],
        replace(maker.shape, frames=latent_frames),
        maker.sampler,
        window=maker.window,
        sink=maker.sink,
    )
    frames = torch.cat([as_uint8(part[0]) for part in parts])
    return frames[: last + 1].permute(0, 2, 3, 1).numpy()


def as_decoded(frames_FHW3: np.ndarray, is_h264: bool) -> np.ndarray:
    """Frames as the codec gives them back, decoded without a browser."""
    pictures = torch.from_numpy(frames_FHW3).permute(0, 3, 1, 2)
    if not is_h264:
        jpegs = [jpeg(picture, 90).data for picture in pictures]
        return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in jpegs])
    height, width = frames_FHW3.shape[1:3]
    encoder, decoder = H264(width, height, 16), av.VideoCodecContext.create("h264", "r")
    packets = [av.Packet(encoder.encode(picture).data) for picture in pictures]
    decoded = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])


def test_the_canvas_shows_the_frames(live: Live, browser: Browser) -> None:
    """H.264 where this Chromium has it, and JPEGs: the right picture, in its colours."""
    url = f"http://127.0.0.1:{live.port}/"
    for script in ("", next(iter(WITHOUT_H264))):
        visit = Visit(browser, url, script=script)
        visit.until("document.body.dataset.ready === 'true'")
        visit.page.locator("#prompt").fill("left in meadow")
        visit.page.locator("#start").click()
        visit.until(f"{FRAME} >= 40")
        has_h264 = not script and visit.ask(HAS_H264)
        if not script:
            assert visit.ask(CODEC) == ("H.264" if has_h264 else f"JPEG ({NO_DECODER})")
        assert visit.ask("Number(document.getElementById('rate').textContent)") > 0
        visit.page.locator("#pause").click()
        visit.page.wait_for_timeout(100)
        frame = visit.ask(FRAME)
        data = visit.ask("Array.from(stage.getImageData(0, 0, 32, 32).data)")
        canvas = np.array(data, np.float32).reshape(32, 32, 4)[..., :3]
        visit.context.close()
        frames = frames_of(live, "left in meadow", 0, frame + 2)
        decoded = as_decoded(frames, has_h264).astype(np.float32)
        distances = np.abs(decoded - canvas).mean((1, 2, 3))
        assert distances.argmin() == frame and distances[frame] < 4, (script, frame, distances)
        colours = np.abs(frames[frame].mean((0, 1)) - canvas.mean((0, 1)))
        assert colours.max() < 8, (script, colours)


def test_jpegs_where_h264_is_not_there_or_fails(live: Live, browser: Browser) -> None:
    """The page says why, and plays on: a decoder that fails loses at most what it held."""
    url = f"http://127.0.0.1:{live.port}/"
    cases = dict(WITHOUT_H264)
    probe = Visit(browser, url)
    if probe.ask(HAS_H264):
        cases |= {FAULT.replace("FAULT", fault): why for fault, why in FAULTS.items()}
    probe.context.close()
    for script, why in cases.items():
        visit = Visit(browser, url, script=script)
        visit.until("document.body.dataset.ready === 'true'")
        visit.page.locator("#start").click()
        visit.until(f"{CODEC} === 'JPEG ({why})'")
        visit.until(f"{FRAME} >= 28")
        shown = visit.ask("window.frames_shown")
        assert shown == sorted(set(shown)) and len(shown) > 10, (why, shown)
        assert visit.complaints == [], why
        visit.context.close()


def test_a_second_page_watches_along(live: Live, browser: Browser) -> None:
    """The button shows the viewer's frames; when the viewer leaves, the seat can be taken."""
    url = f"http://127.0.0.1:{live.port}/"
    viewer = Visit(browser, url, 1280, 800)
    viewer.until("document.body.dataset.ready === 'true'")
    viewer.page.locator("#start").click()
    viewer.until(f"{SAID} === 'seed 0: (no prompt)'")
    viewer.page.locator("#prompt").fill(HOSTILE)
    viewer.page.locator("#start").click()
    viewer.until(f"{FRAME} >= 4")
    visit = Visit(browser, url, 390, 844)
    visit.until(f"{MESSAGE}.startsWith('Somebody else')")
    visit.page.locator("#watch").click()
    visit.until(f"{SAID}.startsWith('seed 0')")
    assert visit.ask(SAID) == f"seed 0: {HOSTILE}" and visit.ask("window.hit") is None
    visit.until("window.frames_shown.length > 12")
    shown = visit.ask("window.frames_shown.slice(0, 13)")  # a watcher's credit at the least
    assert shown == list(range(shown[0], shown[0] + len(shown))) and shown[0] > 0
    assert visit.page.locator("#controls").is_hidden()
    assert visit.ask("document.documentElement.scrollWidth <= window.innerWidth")
    viewer.until("document.getElementById('watchers').textContent === '1 watching along'")
    viewer.page.locator("#camera").click()
    viewer.until(f"{SAID}.startsWith('The next clip is made from the camera')")
    assert viewer.ask("document.documentElement.scrollHeight <= window.innerHeight"), "all in view"
    assert viewer.ask("document.getElementById('picture').clientHeight") > 192
    viewer.page.locator("#camera").click()
    for one in (viewer, visit):  # on a desktop and on a phone
        assert one.page.locator("#model").is_visible()
        assert one.page.locator("#model").text_content() == "student/step_00000000"
    viewer.page.locator("#pause").click()
    visit.until(f"{MESSAGE} === 'The viewer has paused.'")
    late = Visit(browser, url)
    late.until("!document.getElementById('watch').hidden")
    late.page.locator("#watch").click()
    late.until(f"{MESSAGE} === 'The viewer has paused.'")
    assert late.ask(SAID) == f"seed 0: {HOSTILE}"
    late.context.close()
    visit.ask("window.frames_shown.length = 0")
    viewer.page.locator("#pause").click()
    visit.until(f"{MESSAGE} === '' && window.frames_shown.length > 4")
    viewer.page.locator("#pause").click()
    visit.until(f"{MESSAGE} === 'The viewer has paused.'")
    viewer.context.close()
    visit.until("!document.getElementById('take').hidden")
    assert visit.ask(MESSAGE) == ""
    visit.page.locator("#take").click()
    visit.until("document.body.dataset.ready === 'true'")
    assert visit.page.locator("#download").is_disabled(), "the clip was another page's"
    assert visit.ask("document.getElementById('frame').textContent") == "0"
    visit.ask("window.frames_shown.length = 0")
    visit.page.locator("#start").click()
    visit.until("window.frames_shown.length > 4 && window.frames_shown[0] === 0")
    assert visit.complaints == []
    visit.context.close()


def test_the_token_is_taken_from_the_fragment(live: Live, browser: Browser) -> None:
    url = f"http://127.0.0.1:{live.token_port}/"
    without = Visit(browser, url)
    without.until(f"{MESSAGE}.startsWith('Refused')")
    without.context.close()
    visit = Visit(browser, f"{url}#{TOKEN}")
    visit.until("document.body.dataset.ready === 'true'")
    assert visit.page.url == url
    visit.page.reload()
    visit.until("document.body.dataset.ready === 'true'")
    assert [u for u in visit.requests if TOKEN in u.split("#")[0]] == []
    visit.context.close()
