"""The gallery file: escaped, self-contained, allowed by its own policy, and its videos decode to
what went in."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scd_sf.data.clips import read_video
from scd_sf.evaluation.table import COLUMNS, Adherence, ResultRow
from scd_sf.tools.gallery.gallery import PromptCard, build_gallery
from scd_sf.types import UserError

HOSTILE = "<script>alert(1)</script> \"double\" 'single' </section><img src=x onerror=alert(2)> {{ 7*7 }} & more"
ROWS = [
    ResultRow(
        "teacher <b>",
        "teacher",
        "-",
        50,
        "Euler",
        12.0,
        1.0,
        Adherence(1.0, 0.9, 0.5),
        note="</p><script>x</script>",
    ),
    ResultRow("other real clips", "control", "-", 0, "-", 30.0, 1.0, None),
]
CARDS = [
    PromptCard(HOSTILE, 'hall" onclick="x', "still", held_out=True),
    PromptCard("A walk.", "meadow", "forward"),
]


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text of script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style") and not self.found[-1][1]:
            self.texts.setdefault(self.found[-1][0], data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def clip(seed: int) -> Tensor:
    coarse = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gallery") / "gallery.html"
    videos = {
        "teacher <b>": [(0, clip(0)), (1, clip(1))],
        "other real clips": [(0, (clip(2) * 255).to(torch.uint8))],
    }
    build_gallery(path, "Title <i>", ROWS, videos, CARDS, ["A <b>note</b>."], fps=35)
    assert [item.name for item in path.parent.iterdir()] == ["gallery.html"]
    return path.read_text(encoding="utf-8")


def test_hostile_text_is_shown_and_never_markup(page: str) -> None:
    tags = Tags(page)
    assert not tags.named("img") and not tags.named("b") and not tags.named("i")
    assert len([s for s in tags.named("script") if s.get("type") != "text/plain"]) == 1
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    heading = re.search(r"<h3><bdi>(.*?)</bdi></h3>", page, re.DOTALL)
    assert heading is not None and html.unescape(heading.group(1)) == HOSTILE
    assert "place: <bdi>hall&#34; onclick=&#34;x</bdi>" in page


def test_policy_allows_exactly_the_inline_script_and_style(page: str) -> None:
    tags = Tags(page)
    policy = next(
        m["content"] for m in tags.named("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(tags.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not any("style" in attributes for _, attributes in tags.found)


def test_nothing_is_loaded_from_outside(page: str) -> None:
    for tag, attributes in Tags(page).found:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name) is None, (tag, name)
    assert "http://" not in page and "https://" not in page and "@import" not in page


def test_videos_decode_to_what_went_in(page: str, tmp_path: Path) -> None:
    """A place names its video, which is a text that only the script reads."""
    places = [div["data-video"] for div in Tags(page).named("div") if "data-video" in div]
    assert len(places) == 3
    for number, wanted in zip(places, (clip(0), clip(2), clip(1)), strict=True):
        text = re.search(rf'<script type="text/plain" id="video-{number}">([^<]*)</script>', page)
        assert text is not None
        path = tmp_path / "video.mp4"
        path.write_bytes(base64.b64decode(text.group(1), validate=True))
        assert (read_video(path).float() / 255 - wanted).abs().mean() < 0.05


def test_controls_filters_table_and_full_text_are_there(page: str) -> None:
    tags = Tags(page)
    ids = {attributes.get("id") for _, attributes in tags.found}
    assert {"play", "scrub", "loop", "speed", "where", "found"} <= ids
    assert [s["data-filter"] for s in tags.named("select") if "data-filter" in s] == ["0", "1"]
    assert tags.named("body")[0]["data-frames"] == "5"
    for column in COLUMNS:
        assert html.escape(column.explanation, quote=False).replace("'", "&#39;") in page
    for piece in ("12.0", "30.0", "wording never seen in training", "light-dark(", "pixelated"):
        assert piece in page


def test_bad_input_is_named_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gallery.html"
    cases = [
        (ROWS, {"nobody": [(0, clip(0))]}, "which is no row"),
        (ROWS, {"other real clips": [(0, clip(0)[:, :2])]}, "other real clips"),
        ([ROWS[0], ROWS[0]], {}, "two rows"),
    ]
    for rows, videos, word in cases:
        with pytest.raises(UserError, match=word):
            build_gallery(path, "t", rows, videos, CARDS, fps=35)
    file = tmp_path / "file"
    file.write_text("f")
    with pytest.raises(UserError, match="cannot be written"):
        build_gallery(file / "gallery.html", "t", ROWS, {}, CARDS, fps=35)
    assert list(tmp_path.iterdir()) == [file]
    build_gallery(path, "t", ROWS, {}, CARDS, fps=35)  # no videos yet


def test_it_opens_on_videos_and_the_figures_are_below(page: str) -> None:
    assert (
        page.index('class="frame"')
        < page.index('<h2 id="figures">')
        < page.index("A &lt;b&gt;note")
    )
    assert page.index("figures are below the videos") < page.index('class="frame"')
