"""The gallery in a real headless Chromium, from the disk: it plays, finds, compares, and nothing foreign runs.

Needs Chromium (Debian: apt-get install chromium; elsewhere set CHROMIUM to the program).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import gallery_world
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from scd_sf.data.clips import read_video, write_video
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
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def chromium(asked: str | None, path: str | None) -> str:
    """The program: the one asked for, else from ``path``. AssertionError that says how to install it."""
    program = asked or shutil.which("chromium", path=path) or shutil.which("chromium-browser", path=path)
    assert program, "no Chromium: apt-get install -y chromium, or set CHROMIUM to the program"
    return program


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium(os.environ.get("CHROMIUM"), os.environ.get("PATH"))
    with sync_playwright() as playwright:  # each launch has an empty profile of its own
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=QUIET)
        yield browser
        browser.close()


def test_it_says_how_to_get_chromium() -> None:
    with pytest.raises(AssertionError, match="apt-get install -y chromium"):
        chromium(None, "")


COUNT_BLOBS = """window.blobs = 0;
const { createObjectURL, revokeObjectURL } = URL;
URL.createObjectURL = (blob) => { window.blobs += 1; return createObjectURL(blob); };
URL.revokeObjectURL = (address) => { window.blobs -= 1; revokeObjectURL(address); };"""
# A seek that is never painted, as Chromium has them now and then: as many as window.losing says.
LOSE_SEEKS = """window.losing = 0;
const { get, set } = Object.getOwnPropertyDescriptor(HTMLMediaElement.prototype, "currentTime"), said = new WeakMap();
Object.defineProperty(HTMLMediaElement.prototype, "currentTime", {
  get() { return said.has(this) ? said.get(this) : get.call(this); },
  set(time) {
    if (window.losing > 0) { window.losing -= 1; said.set(this, time); return; }
    said.delete(this);
    set.call(this, time);
  },
});"""


class Visit:
    """A page with all that it complained about or asked for."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.devtools = self.context.new_cdp_session(self.page)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.page.add_init_script(COUNT_BLOBS)
        self.page.add_init_script(LOSE_SEEKS)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready=true]")

    def foreign(self, folder: Path) -> list[str]:
        """Requests that are neither the page's own files nor inside it."""
        own = (folder.as_uri(), "data:", "blob:")
        return [url for url in self.requests if not url.startswith(own)]

    def until(self, script: str, seconds: float = 15.0) -> None:
        """Asked again and again: the page's policy forbids the eval of Playwright's own waiting."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"never became true: {script}"
            self.page.wait_for_timeout(30)

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def brightness(self, place: str) -> float:
        """Mean of the pixels that are shown there, 0..255, without the rounded corners."""
        picture = Image.open(BytesIO(self.page.locator(place).screenshot())).convert("RGB")
        pixels = np.asarray(picture).astype(float)
        return float(pixels[8:-8, 8:-8].mean())

    def until_painted(self, place: str, wanted: float) -> None:
        """Until a place is of that brightness."""
        end = time.monotonic() + 15
        while abs((found := self.brightness(place)) - wanted) >= 4:
            assert time.monotonic() < end, (place, found, wanted)
            self.page.wait_for_timeout(60)

    def alive(self) -> int:
        """Video elements that the page's memory holds, in the document or not; garbage is collected first."""
        prototype = self.devtools.send("Runtime.evaluate", {"expression": "HTMLVideoElement.prototype"})["result"]
        found = self.devtools.send("Runtime.queryObjects", {"prototypeObjectId": prototype["objectId"]})["objects"]
        count = {"objectId": found["objectId"], "functionDeclaration": "function () { return this.length; }"}
        number = self.devtools.send("Runtime.callFunctionOn", count)["result"]["value"]
        self.devtools.send("Runtime.releaseObject", {"objectId": found["objectId"]})
        return int(number)

    def worked(self) -> float:
        """Processor seconds of the page's main thread."""
        metrics = self.devtools.send("Performance.getMetrics")["metrics"]
        return next(float(metric["value"]) for metric in metrics if metric["name"] == "TaskDuration")

    def resident(self) -> int:
        """Bytes of anonymous memory of all the browser's processes."""
        browser = self.context.browser
        assert browser is not None
        found = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        status = [Path(f"/proc/{process['id']}/status").read_text() for process in found]
        return sum(int(text.split("RssAnon:")[1].split()[0]) * 1024 for text in status)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of four prompts, as one file and as a folder; one video missing, one damaged, one prompt absent, and
    one of a codec that PyAV reads and Chromium does not."""
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
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    page = page_of([read_folder(folder) for folder in folders], "Three models")
    write_page(page, root / "one.html")
    write_page(page, root / "many")
    return root


@pytest.fixture(params=["one.html", "many/index.html"])
def visit(request: pytest.FixtureRequest, world: Path, browser: Browser) -> Iterator[Visit]:
    found = Visit(browser, world / request.param, viewport={"width": 1200, "height": 900})
    yield found
    assert found.foreign(world) == []
    found.context.close()


SHOWN = "[...document.querySelectorAll('.card')].filter((c) => !c.hidden).length"
WIPED = "[...document.querySelectorAll('#wipe video')].map((v) => v.currentTime)"
TIMES = "[...document.querySelectorAll('.card video')].map((v) => v.currentTime)"


def test_it_plays_in_step_and_scrubs(visit: Visit) -> None:
    """All videos move, together; pause, a frame on, the slider, and the end of the loop hold them where they belong."""
    visit.until("document.querySelectorAll('.card video').length >= 5")
    visit.until(f"{TIMES}.every((t) => t > 0.3)")
    spreads = []
    for _ in range(15):
        times = visit.ask(TIMES)
        spreads.append(max(times) - min(times))
        visit.page.wait_for_timeout(40)
    assert sorted(spreads)[len(spreads) // 2] < 0.15, spreads  # 1.5 frames; a wrap of the loop may fall between
    assert visit.ask("document.body.dataset.playing") == "true"
    visit.page.keyboard.press("Space")
    assert visit.ask("document.body.dataset.playing") == "false"
    visit.page.locator("#scrub").fill("7")
    visit.until(f"{TIMES}.every((t) => Math.abs(t - 0.725) < 0.06)")
    assert visit.ask("document.getElementById('where').textContent") == "frame 8 of 20"
    visit.page.locator("h1").click()
    visit.page.keyboard.press("ArrowRight")
    visit.until(f"{TIMES}.every((t) => Math.abs(t - 0.825) < 0.06)")
    visit.page.keyboard.press("ArrowLeft")
    visit.page.keyboard.press("ArrowLeft")
    assert visit.ask("document.getElementById('where').textContent") == "frame 7 of 20"
    visit.page.locator("#scrub").focus()
    visit.page.keyboard.press("Space")
    assert visit.ask("document.body.dataset.playing") == "true", "the slider leaves the space bar to playing"
    assert visit.complaints == []


def test_the_frame_shown_is_the_frame_named(visit: Visit, world: Path) -> None:
    """Pixels on the screen against the decoded file, frame by frame: neighbours differ by more than 40 of 255. Also
    where the browser loses a seek."""
    wanted = read_video(world / "teacher" / "0000-00.mp4").float().mean((1, 2, 3)).tolist()
    visit.until("document.querySelectorAll('.card video').length >= 5")
    visit.page.keyboard.press("Space")
    for frame in (0, 1, 2, 7, 13, 18, 19):
        visit.page.locator("#scrub").fill(str(frame))
        visit.until("[...document.querySelectorAll('.card video')].every((v) => v.readyState >= 2 && !v.seeking)")
        for model in range(3):
            visit.until_painted(f"#card0 figure[data-model='{model}'] .frame", wanted[frame])
    visit.page.wait_for_timeout(400)
    count = visit.ask("window.losing = document.querySelectorAll('.card video').length")
    visit.page.locator("#scrub").fill("5")
    assert count >= 5 and visit.ask("window.losing") == 0
    for model in range(3):
        visit.until_painted(f"#card0 figure[data-model='{model}'] .frame", wanted[5])
    assert visit.complaints == []


def test_search_filters_and_models(visit: Visit) -> None:
    for text, count in (("fox", 2), ("FOX lake", 1), ("nothing like it", 0), ("", 4)):
        visit.page.locator("#search").fill(text)
        assert visit.ask(SHOWN) == count, text
    assert visit.ask("document.getElementById('found').textContent") == "4 of 4 prompts"
    visit.page.locator("h1").click()
    visit.page.keyboard.press("/")
    assert visit.ask("document.activeElement.id") == "search"
    visit.page.keyboard.type("night")
    assert visit.ask(SHOWN) == 1
    visit.page.keyboard.press("Escape")
    assert visit.ask(SHOWN) == 4 and visit.ask("document.activeElement.id") != "search"
    visit.page.locator("#search").fill("nothing like it")
    assert visit.ask("document.getElementById('none').offsetParent !== null")
    visit.page.locator("#search").fill("")
    visit.page.locator("select[data-filter='0']").select_option(label="some are not there")
    assert visit.ask(SHOWN) == 1
    visit.page.locator("select[data-filter='0']").select_option(label="all")
    visit.page.locator("input[data-model='1']").uncheck()
    assert visit.ask("[...document.querySelectorAll('figure')].filter((f) => f.offsetParent !== null).length") == 8
    before = visit.ask("document.querySelector('figure').offsetWidth")
    visit.page.locator("#size").select_option("small")
    assert visit.ask("document.querySelector('figure').offsetWidth") < before
    assert visit.complaints == []


def test_places_without_a_video_are_marked(visit: Visit) -> None:
    """Missing and damaged ones by the page, one that only the browser cannot play by the script; the rest plays."""
    visit.page.locator("#card3").scroll_into_view_if_needed()
    marks = "[...document.querySelectorAll('#card3 .mark')].map((m) => m.textContent)"
    assert visit.ask(marks) == ["no video of this prompt", "video is damaged", "video is missing"]
    visit.page.locator("#card2").scroll_into_view_if_needed()
    visit.until("document.querySelectorAll('#card2 [data-state=broken]').length === 1")
    assert visit.page.locator("#card2 [data-state=broken]").inner_text() == "video cannot be played"
    assert visit.page.locator("#card3 .compare").count() == 0
    visit.until(f"{TIMES}.some((t) => t > 0.3)")


def test_two_models_against_each_other(visit: Visit, world: Path) -> None:
    """Opened by key, both sides play by the page's clock and controls, the wipe follows slider, pointer and keys."""
    visit.page.keyboard.press("j")
    visit.page.keyboard.press("c")
    visit.until("document.getElementById('compare').open && document.querySelectorAll('#wipe video').length === 2")
    visit.until("[...document.querySelectorAll('#wipe video')].every((v) => v.readyState >= 2)")
    assert visit.ask("document.getElementById('compared').textContent") == "a red fox in snow"
    names = "[...document.querySelectorAll('#wipe span')].map((s) => s.textContent)"
    assert visit.ask(names) == ["A: teacher", "B: causal"]
    cut = "getComputedStyle(document.querySelector('#wipe .top')).clipPath"
    visit.page.locator("#wiper").fill("20")
    assert visit.ask(cut) == "inset(0px 0px 0px 20%)"
    visit.page.keyboard.press("]")
    assert visit.ask(cut) == "inset(0px 0px 0px 25%)"
    box = visit.page.locator("#wipe").bounding_box()
    assert box is not None
    visit.page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 20)
    visit.page.mouse.down()
    visit.page.mouse.up()
    assert abs(float(visit.ask("document.getElementById('wiper').value")) - 75) <= 1
    visit.page.locator("#play").click()
    assert visit.ask("document.body.dataset.playing") == "false", "the controls are within reach of the pointer"
    visit.page.locator("#scrub").fill("3")
    visit.until(f"{WIPED}.every((t) => Math.abs(t - 0.325) < 0.06)")
    visit.page.locator("#swap").click()
    assert visit.ask(names) == ["A: causal", "B: teacher"]
    visit.page.locator("#after").click()
    assert visit.ask("document.getElementById('compared').textContent") == "an empty hall"
    assert visit.ask(names) == ["A: causal", "B: teacher"], "the models stay from prompt to prompt"
    visit.until(f"{WIPED}.length === 2 && {WIPED}.every((t) => Math.abs(t - 0.325) < 0.06)")
    visit.page.keyboard.press("k")
    assert visit.ask("document.getElementById('compared').textContent") == "a red fox in snow"
    visit.page.keyboard.press("Escape")
    visit.until("!document.getElementById('compare').open && document.querySelectorAll('#wipe video').length === 0")
    assert visit.ask("document.activeElement.id") == "card0" and visit.ask(
        "document.querySelector('body > #bar') !== null"
    )
    assert visit.complaints == []


def test_the_wipe_shows_a_left_and_b_right(tmp_path: Path, browser: Browser) -> None:
    """Pixels left and right of the line against the two files."""
    folders = [gallery_world.write_folder(tmp_path / name, ["p"]) for name in ("dark", "bright")]
    for folder, value in zip(folders, (40, 200), strict=True):
        write_video(folder / "0000-00.mp4", torch.full((5, 3, 32, 32), value, dtype=torch.uint8), 10)
    visit = Visit(browser, write_page(page_of([read_folder(f) for f in folders], "T"), tmp_path / "page"))
    visit.page.keyboard.press("c")
    visit.until(f"{WIPED}.length === 2")
    visit.until("[...document.querySelectorAll('#wipe video')].every((v) => v.readyState >= 2)")
    for share in (30, 80):
        visit.page.locator("#wiper").fill(str(share))
        visit.page.wait_for_timeout(150)
        row = np.asarray(Image.open(BytesIO(visit.page.locator("#wipe").screenshot())).convert("L")).astype(float)
        row = row[int(row.shape[0] * 0.7)]
        line = round(row.size * share / 100)
        assert abs(row[10 : line - 6].mean() - 40) < 4 and abs(row[line + 6 : -10].mean() - 200) < 4, share
    visit.context.close()


def test_samples_and_words(tmp_path: Path, browser: Browser) -> None:
    """Several samples of a prompt can be told apart and chosen; the prompt really used is shown and found."""
    prompts = ["a fox at length, in deep snow", "a hall"]
    folders = [gallery_world.write_folder(tmp_path / name, prompts, samples=3) for name in ("one", "two")]
    for folder in folders:
        gallery_world.change(folder, lambda m: [e.update(title="a fox") for e in list(m["videos"].values())[:3]])
    visit = Visit(browser, write_page(page_of([read_folder(f) for f in folders], "T"), tmp_path / "page.html"))
    assert visit.page.locator("#card0 h3").inner_text() == "a fox"
    assert "in deep snow" in visit.page.locator("#card0 .words").inner_text()
    visit.page.locator("#search").fill("deep snow")
    assert visit.ask(SHOWN) == 1
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("c")
    options = "[...document.querySelectorAll('#sideA option')].map((o) => o.textContent)"
    assert visit.ask(options) == [f"{name}, sample {number}" for name in ("one", "two") for number in (1, 2, 3)]
    assert visit.ask("document.getElementById('sideB').selectedOptions[0].textContent") == "two, sample 1"
    visit.page.keyboard.press("Escape")
    visit.page.locator("#sample").select_option(label="2")
    seen = (
        "[...document.querySelectorAll('figure')].filter((f) => f.offsetParent !== null).map((f) => f.dataset.sample)"
    )
    assert visit.ask(seen) == ["1"] * 4
    assert "4 steps · renoise · seed 7100" in visit.page.locator("#card0 figure[data-sample='1']").first.inner_text()
    visit.page.locator("h1").click()
    visit.page.keyboard.press("d")
    facts = visit.page.locator("#card0 figure[data-sample='1'] dl").first.inner_text()
    assert "steps\n4" in facts and "checkpoint\none" in facts and "0000-01.mp4" in facts
    assert visit.complaints == []
    visit.context.close()


def test_keys_and_colours(visit: Visit, world: Path, browser: Browser) -> None:
    visit.page.keyboard.press("?")
    assert visit.ask("document.getElementById('help').open")
    visit.page.keyboard.press("j")
    assert visit.ask("document.activeElement.closest('#help') !== null"), "the page below takes no keys"
    visit.page.keyboard.press("Escape")
    assert not visit.ask("document.getElementById('help').open")
    before = visit.ask("getComputedStyle(document.body).backgroundColor")
    visit.page.keyboard.press("t")
    after = visit.ask("getComputedStyle(document.body).backgroundColor")
    assert (before, after) == ("rgb(246, 246, 244)", "rgb(19, 20, 22)")
    visit.page.keyboard.press("j")
    visit.page.keyboard.press("j")
    assert visit.ask("document.activeElement.id") == "card1"
    visit.page.keyboard.press("k")
    assert visit.ask("document.activeElement.id") == "card0"
    visit.page.keyboard.press("Home")
    assert visit.ask("document.getElementById('where').textContent") == "frame 1 of 20"
    outline = (
        "(() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth; })()"
    )
    reached = set()
    for _ in range(14):
        visit.page.keyboard.press("Tab")
        reached.add(visit.ask("document.activeElement.tagName"))
        assert visit.ask(outline) == "solid3px", visit.ask("document.activeElement.outerHTML")
    assert {"BUTTON", "SUMMARY"} <= reached
    dark = Visit(browser, world / "one.html", color_scheme="dark", reduced_motion="reduce")
    assert dark.ask("getComputedStyle(document.body).backgroundColor") == after
    assert dark.ask("document.body.dataset.playing") == "false"
    dark.context.close()
    assert visit.complaints == []


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
          await new Promise((done) => setTimeout(done, 300));
          return said;
        })()""")
        assert {"img-src", "connect-src", "fetch", "style-src-elem"} <= set(tried) and tried.count("TypeError") >= 1
        assert visit.ask("window.hit") is None and visit.ask("document.querySelectorAll('.card').length") == 4
        visit.context.close()


@pytest.mark.parametrize("name", ["page.html", "page"])
def test_hostile_text_is_text(tmp_path: Path, browser: Browser, name: str) -> None:
    """Prompts, names, facts, titles: nothing runs, nothing breaks, every card is there with its own text."""
    folder = gallery_world.write_folder(tmp_path / "<b>model</b>", HOSTILE, padding=8)
    other = gallery_world.write_folder(tmp_path / "plain", HOSTILE[:2], padding=8)

    def poison(manifest: dict[str, Any]) -> None:
        evil = HOSTILE[1]
        manifest["settings"] |= {"checkpoint": evil, "sampler": {"name": evil, "steps": HOSTILE[0]}, evil: evil}
        for entry in manifest["videos"].values():
            entry |= {"seed": evil, "title": entry["prompt"], "prompt": HOSTILE[0] + evil}
        manifest["videos"]["<img src=x onerror=alert(1)>.mp4"] = {"prompt": HOSTILE[0]}

    pages = [read_folder(gallery_world.change(folder, poison)), read_folder(other, '"><script>window.hit = 1</script>')]
    index = write_page(page_of(pages, "</title><script>window.hit = 1</script>"), tmp_path / name)
    visit = Visit(browser, index)
    visit.page.keyboard.press("c")
    visit.page.wait_for_timeout(500)
    assert visit.ask("document.getElementById('compare').open")
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("d")
    assert visit.ask("window.hit") is None and visit.complaints == [] and visit.foreign(tmp_path) == []
    assert visit.page.url == index.as_uri()
    texts = visit.ask("[...document.querySelectorAll('h3')].map((h) => h.textContent)")
    for wanted, found in zip(HOSTILE, texts, strict=True):
        clean = "".join("\ufffd" if c in "\0\x07\u202e\u202c\u200f\u2066" else c for c in wanted)
        assert found == clean
    assert visit.ask("document.querySelectorAll('img, iframe, object, embed, link, base, form, a').length") == 0
    assert visit.ask("document.documentElement.scrollWidth <= window.innerWidth")
    visit.page.locator("#search").fill("javascript:window")
    assert visit.ask(SHOWN) == 1
    visit.context.close()


@pytest.mark.parametrize("name", ["page.html", "page"])
def test_a_thousand_videos(tmp_path: Path, browser: Browser, name: str) -> None:
    """250 prompts of 4 models, 100 MB: usable within 2 s, and only what is near the screen is a video, wherever one
    scrolls, however often."""
    prompts = [f"prompt number {number} of a long list" for number in range(250)]
    folders = [gallery_world.write_folder(tmp_path / f"m{i}", prompts, size=128, padding=100_000) for i in range(4)]
    index, single = write_page(page_of([read_folder(f) for f in folders], "Many"), tmp_path / name), "." in name
    tried = []
    for attempt in range(3):  # whatever else the machine does only adds to the time
        started = time.monotonic()
        visit = Visit(browser, index, viewport={"width": 1200, "height": 900})
        visit.until("[...document.querySelectorAll('video')].some((video) => video.readyState >= 2)", 60)
        visit.page.locator("#search").fill("number 24")
        assert visit.ask(SHOWN) == 13  # 24, 124, 224, 240 .. 249
        seconds, worked = time.monotonic() - started, visit.worked()
        tried.append((seconds, worked))
        busy = (os.cpu_count() or 1) < os.getloadavg()[0]  # others share the machine: then the page's own time counts
        if seconds < 2.0 or (busy and worked < 2.0):
            break
        assert attempt < 2, tried
        visit.context.close()
    visit.page.locator("#search").fill("")
    visit.until("document.readyState === 'complete'", 60)
    most, held = 0, [visit.resident()]
    for _ in range(2):
        for place in range(0, 100_000, 8_000):
            visit.ask(f"window.scrollTo(0, {place})")
            visit.page.wait_for_timeout(100)
            most = max(most, visit.ask("document.querySelectorAll('video').length"))
        visit.until("[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)", 60)
        assert visit.ask("window.blobs") == (visit.ask("document.querySelectorAll('video').length") if single else 0)
        held.append(visit.resident())
    print(f"{name}: usable after {seconds:.2f} s, {worked:.2f} s of work; {most} videos at most; bytes {held}")
    assert 0 < most <= 40 and visit.alive() <= 40, (most, visit.alive())  # of some 400 places that were shown
    assert held[2] - held[0] < 300e6, held
    assert visit.complaints == [] and visit.foreign(tmp_path) == []
    visit.context.close()
