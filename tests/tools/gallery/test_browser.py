"""The gallery in a real headless Chromium, from the disk: it plays in step, finds, and nothing
foreign runs.

Needs Chromium (Debian: apt-get install chromium; elsewhere set CHROMIUM to the program).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import gallery_world
import numpy as np
import pytest
from browsers import QUIET, chromium
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from scd_sf.data.clips import read_video
from scd_sf.tools.gallery.folders import page_of, read_folder
from scd_sf.tools.gallery.page import write_page

pytestmark = [pytest.mark.slow, pytest.mark.browser]
HOSTILE = [
    "</script><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "<!--<script> {{ 7*7 }} ]]> &lt;b&gt;",
    "javascript:window.hit=1",
    "\u202eright to left\u202c \u200f\u2066marks",
    "ten kilobytes " + "x" * 10_000,
    "a NUL \0 and a bell \x07",
    "line one\nline two",
]
SHOWN = "[...document.querySelectorAll('.card')].filter((c) => !c.hidden).length"
TIMES = "[...document.querySelectorAll('.card video')].map((v) => v.currentTime)"
WHERE = "document.getElementById('where').textContent"
PLAYING = "document.body.dataset.playing"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with pytest.raises(AssertionError, match="apt-get install -y chromium"):
        chromium(None, "")
    program = chromium(os.environ.get("CHROMIUM"), os.environ.get("PATH"))
    with sync_playwright() as playwright:  # each launch has an empty profile of its own
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=QUIET)
        yield browser
        browser.close()


class Visit:
    """A page with all that it complained about or asked for."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # milliseconds
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready=true]")

    def close(self, folder: Path) -> None:
        """Nothing may have been said, and nothing asked for but the page's own files and what is
        inside it."""
        own = (folder.as_uri(), "data:", "blob:")
        assert (
            self.complaints == []
            and [url for url in self.requests if not url.startswith(own)] == []
        )
        self.context.close()

    def until(self, script: str, seconds: float = 60.0) -> None:
        """Asked again and again: the page's policy forbids the eval of Playwright's own waiting."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"never became true: {script}"
            self.page.wait_for_timeout(30)

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def until_painted(self, place: str, wanted: float) -> None:
        """Until the mean of the pixels that are shown there, without the rounded corners, is
        that."""
        end = time.monotonic() + 60
        while True:
            picture = Image.open(BytesIO(self.page.locator(place).screenshot())).convert("RGB")
            found = float(np.asarray(picture).astype(float)[8:-8, 8:-8].mean())
            if abs(found - wanted) < 4:
                return
            assert time.monotonic() < end, (place, found, wanted)
            self.page.wait_for_timeout(60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of four prompts, as one file and as a folder; one video missing, one damaged,
    one prompt absent, and one of a codec that PyAV reads and Chromium does not."""
    root = tmp_path_factory.mktemp("gallery")
    prompts = ["a red fox in snow", "an empty hall", "a lake at night", "a fox by a lake"]
    folders = [
        gallery_world.write_folder(root / name, prompts[: 3 if name == "teacher" else 4], frames=20)
        for name in ("teacher", "causal", "scd")
    ]
    (folders[2] / "0003-00.mp4").unlink()
    (folders[1] / "0003-00.mp4").write_bytes(b"not a video")
    with av.open(str(folders[1] / "0002-00.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(20):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                )
            )
        container.mux(stream.encode())
    page = page_of([read_folder(folder) for folder in folders], "Three models")
    write_page(page, root / "one.html")
    write_page(page, root / "many")
    return root


@pytest.mark.parametrize("name", ["one.html", "many/index.html"])
def test_it_plays_in_step_and_shows_the_frame_it_names(
    world: Path, browser: Browser, name: str
) -> None:
    """All videos move, together; pause, arrows and slider hold them where they belong: pixels on
    the screen against the decoded file (neighbouring frames differ by more than 40 of 255)."""
    visit = Visit(browser, world / name)
    visit.until(f"{TIMES}.length >= 5 && {TIMES}.every((t) => t > 0.3)")
    spreads = []
    for _ in range(15):
        times = visit.ask(TIMES)
        spreads.append(max(times) - min(times))
        visit.page.wait_for_timeout(40)
    # the page moves what is four frames off; a wrap of the loop may fall between
    assert sorted(spreads)[len(spreads) // 2] < 0.5, spreads
    visit.page.keyboard.press("Space")
    assert visit.ask(PLAYING) == "false"
    wanted = read_video(world / "teacher" / "0000-00.mp4").float().mean((1, 2, 3)).tolist()
    for frame in (0, 1, 7, 18, 19):
        visit.page.locator("#scrub").fill(str(frame))
        for model in range(3):
            visit.until_painted(
                f".card:nth-of-type(1) figure[data-model='{model}'] .frame", wanted[frame]
            )
        assert visit.ask(WHERE) == f"frame {frame + 1} of 20"
    visit.page.locator("h1").click()
    for key, frame in (("ArrowRight", 0), ("ArrowLeft", 19), ("ArrowLeft", 18)):
        visit.page.keyboard.press(key)
        assert visit.ask(WHERE) == f"frame {frame + 1} of 20"
    visit.until(f"{TIMES}.every((t) => Math.abs(t - 1.825) < 0.06)")
    visit.page.locator("#loop").uncheck()
    visit.page.locator("#scrub").focus()
    visit.page.keyboard.press("Space")
    # it plays to the end: the slider leaves the space bar to playing
    visit.until(f"{PLAYING} === 'false' && {WHERE} === 'frame 20 of 20'")
    visit.close(world)
    still = Visit(browser, world / name, reduced_motion="reduce")
    assert still.ask(PLAYING) == "false"
    still.close(world)


def test_search_filters_models_and_marks(world: Path, browser: Browser) -> None:
    """Places without a video are marked by the page, one that only the browser cannot play by the
    script."""
    visit = Visit(browser, world / "one.html")
    for text, count in (("fox", 2), ("FOX lake", 1), ("nothing like it", 0), ("", 4)):
        visit.page.locator("#search").fill(text)
        assert visit.ask(SHOWN) == count, text
    assert visit.ask("document.getElementById('found').textContent") == "4 of 4 prompts"
    visit.page.locator("h1").click()
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("night")
    assert visit.ask(SHOWN) == 1
    visit.page.locator("#search").fill("")
    visit.page.locator("select[data-filter='0']").select_option(label="some are not there")
    assert visit.ask(SHOWN) == 1
    faults = (
        "[...document.querySelectorAll('.card:nth-of-type(4) .frame')].map((m) => m.textContent)"
    )
    assert visit.ask(faults) == ["no video of this prompt", "video is damaged", "video is missing"]
    visit.page.locator("select[data-filter='0']").select_option(label="all")
    visit.page.locator(".card:nth-of-type(3)").scroll_into_view_if_needed()
    visit.until("document.querySelectorAll('[data-state=broken]').length === 1")
    assert visit.page.locator("[data-state=broken]").inner_text() == "video cannot be played"
    visit.until(f"{TIMES}.some((t) => t > 0.3)")
    visit.page.locator("input[data-model='1']").uncheck()
    assert (
        visit.ask(
            "[...document.querySelectorAll('figure')].filter((f) => f.offsetParent !== null).length"
        )
        == 8
    )
    before = visit.ask("document.querySelector('figure').offsetWidth")
    visit.page.locator("#size").select_option("small")
    assert visit.ask("document.querySelector('figure').offsetWidth") < before
    visit.page.locator("button.copy").first.click()
    assert visit.ask("getSelection().toString()") == "a red fox in snow"
    visit.close(world)


def test_the_policy_forbids_what_the_page_does_not_do(world: Path, browser: Browser) -> None:
    """Even a script that got in could load nothing, run nothing more and write no markup."""
    for name in ("one.html", "many/index.html"):
        visit = Visit(browser, world / name)
        tried = visit.ask("""(async () => {
          const said = [];
          document.addEventListener("securitypolicyviolation", (event) => said.push(event.effectiveDirective));
          for (const tag of ["script", "style"]) {
            const part = document.createElement(tag);
            try { part.textContent = tag === "script" ? "window.hit = 1" : "body { opacity: 0 }"; }
            catch (error) { said.push(error.name); }
            document.body.append(part);
          }
          try { document.body.innerHTML = "<b>x</b>"; } catch (error) { said.push(error.name); }
          document.body.append(Object.assign(document.createElement("img"), { src: "https://example.org/x.png" }));
          await fetch("https://example.org/").catch(() => said.push("fetch"));
          const wanted = ["img-src", "connect-src", "fetch", "style-src-elem"];
          for (let n = 0; n < 600 && !wanted.every((one) => said.includes(one)); n += 1)
            await new Promise((done) => setTimeout(done, 100));
          return said;
        })()""")
        assert {"img-src", "connect-src", "fetch", "style-src-elem"} <= set(tried) and tried.count(
            "TypeError"
        ) >= 1
        assert (
            visit.ask("window.hit") is None
            and visit.ask("document.querySelectorAll('.card').length") == 4
        )
        visit.context.close()


@pytest.mark.parametrize("name", ["page.html", "page"])
def test_hostile_text_is_text(tmp_path: Path, browser: Browser, name: str) -> None:
    """Prompts, names, facts, titles: nothing runs, nothing breaks, every card is there with its own
    text."""
    folder = gallery_world.write_folder(tmp_path / "<b>model</b>", HOSTILE, padding=8)
    other = gallery_world.write_folder(tmp_path / "plain", HOSTILE[:2], padding=8)

    def poison(manifest: dict[str, Any]) -> None:
        evil = HOSTILE[1]
        manifest["settings"] |= {
            "checkpoint": evil,
            "sampler": {"name": evil, "steps": HOSTILE[0]},
            evil: evil,
        }
        for entry in manifest["videos"].values():
            entry |= {"title": entry["prompt"], "prompt": HOSTILE[0] + evil}
        manifest["videos"]["<img src=x onerror=alert(1)>.mp4"] = {"prompt": HOSTILE[0]}

    pages = [
        read_folder(gallery_world.change(folder, poison)),
        read_folder(other, '"><script>window.hit = 1</script>'),
    ]
    index = write_page(page_of(pages, "</title><script>window.hit = 1</script>"), tmp_path / name)
    visit = Visit(browser, index)
    visit.page.wait_for_timeout(300)
    assert visit.ask("window.hit") is None and visit.page.url == index.as_uri()
    texts = visit.ask("[...document.querySelectorAll('h3')].map((h) => h.textContent)")
    for wanted, found in zip(HOSTILE, texts, strict=True):
        assert found == "".join(
            "\ufffd" if c in "\0\x07\u202e\u202c\u200f\u2066" else c for c in wanted
        )
    assert (
        visit.ask(
            "document.querySelectorAll('img, iframe, object, embed, link, base, form, a').length"
        )
        == 0
    )
    assert visit.ask("document.documentElement.scrollWidth <= window.innerWidth")
    visit.page.locator("#search").fill("javascript:window")
    assert visit.ask(SHOWN) == 1
    visit.close(tmp_path)


@pytest.mark.parametrize("name", ["page.html", "page"])
def test_a_thousand_videos(tmp_path: Path, browser: Browser, name: str) -> None:
    """250 prompts of 4 models, 100 MB: only what is near the screen is a video, wherever one
    scrolls."""
    prompts = [f"prompt number {number} of a long list" for number in range(250)]
    folders = [
        gallery_world.write_folder(tmp_path / f"m{i}", prompts, size=128, padding=100_000)
        for i in range(4)
    ]
    index = write_page(page_of([read_folder(f) for f in folders], "Many"), tmp_path / name)
    started = time.monotonic()
    visit = Visit(browser, index)
    visit.until(
        "[...document.querySelectorAll('video')].some((video) => video.readyState >= 2)", 60
    )
    visit.page.locator("#search").fill("number 24")
    assert visit.ask(SHOWN) == 13  # 24, 124, 224, 240 .. 249
    print(f"{name}: usable after {time.monotonic() - started:.2f} s")
    visit.page.locator("#search").fill("")
    counts = []
    for place in range(0, 100_000, 8_000):
        visit.ask(f"window.scrollTo(0, {place})")
        visit.page.wait_for_timeout(100)
        counts.append(visit.ask("document.querySelectorAll('video').length"))
    assert 0 < max(counts) <= 40, counts  # of some 200 places that were shown
    visit.until(
        "[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)", 60
    )
    visit.close(tmp_path)
