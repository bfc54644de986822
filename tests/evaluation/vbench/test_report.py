"""The report: rows, and text of others that stays text."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import recipe_runner

from scd_sf.evaluation.vbench.aggregate import Scores, read_scores
from scd_sf.evaluation.vbench.prompts import packaged
from scd_sf.evaluation.vbench.report import html, markdown, own_row, published_rows, write_report
from scd_sf.types import UserError

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\" onload='x' <img src=x>",
    "\u202egpj.exe\u2066 & {{ 7*7 }}",
    "100% #1?",
]
SCRIPT = "vbench_eval/report.py"


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def scores(folder: Path) -> Path:
    rows = packaged("published.json")["rows"]
    assert isinstance(rows, list)
    fractions = {name: value / 100 for name, value in rows[0]["percent"].items()}
    summary = {
        "scores": fractions,
        "reduced": ["1 instead of 5 videos"],
        "protocol": {"settings": {"fps": 16, "a": HOSTILE[0]}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder / "summary.json"


def test_the_script_and_its_files(tmp_path: Path) -> None:
    videos = tmp_path / "run" / "videos"
    videos.mkdir(parents=True)
    for number in range(2):
        (videos / f"a dog, 100%-{number}.mp4").write_bytes(b"video")
    given = [
        f"scores={{ours: {scores(tmp_path)}}}",
        f"videos={tmp_path}/run",
        f"out={tmp_path}/report",
    ]
    out = recipe_runner.succeed(SCRIPT, *given).out
    assert "ours: total 82.24 (not comparable: 1 instead of 5 videos)" in out
    table = (tmp_path / "report" / "report.md").read_text()
    assert (
        table.splitlines()[2].startswith("| ours | this run | 82.24 | 83.53 | 77.06 |")
        and "Self Forcing" in table
    )
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(found["rows"]) == 1 + len(published_rows()) and found["rows"][0]["note"].startswith(
        "not comparable"
    )
    page = Page()
    page.feed((tmp_path / "report" / "report.html").read_text())
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "video"]
    for source in sources:
        assert source is not None and (tmp_path / "report" / unquote(source)).is_file()
    assert len(sources) == 2 and "a dog, 100%" in page.text
    assert all(attrs.get("preload") == "none" for tag, attrs in page.tags if tag == "video")
    for wrong, words in (
        ([*given[:1], f"videos={tmp_path}/report", given[2]], "holds no mp4 file"),
        ([given[2]], "scores is empty"),
        (["scores={a: none.json}", given[2]], "none.json: cannot be read"),
    ):
        result = recipe_runner.run(SCRIPT, *wrong)
        assert result.code == 2 and words in result.err and "Traceback" not in result.err


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    own = read_scores(scores(tmp_path))
    rows = [own_row(HOSTILE[1], Scores(own.fractions, (HOSTILE[0],)))]
    cards = [(prompt, [tmp_path / f"{prompt.replace('/', '_')}-0.mp4"]) for prompt in HOSTILE]
    text = html(rows, cards, tmp_path / "report.html", {"guidance": HOSTILE[0]})
    page = Page()
    page.feed(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "a", "link"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert text.count("<script") == 0 and "alert(1)" in page.text and "{{ 7*7 }}" in page.text
    assert "\u202e" not in text and "\u2066" not in text
    sources = [str(attrs["src"]) for tag, attrs in page.tags if tag == "video"]
    assert [unquote(source) for source in sources] == [
        file.name for _, files in cards for file in files
    ]
    table = markdown(rows)
    assert "<" not in table.replace("\\<", "") and "\\<script\\>" in table
    assert table.splitlines()[2].count(" | ") == table.splitlines()[0].count(" | ")
    partial = own_row("few", Scores({"scene": 0.5}))
    assert not partial.totals and "15 of 16 dimensions missing" in partial.note


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.html"])
def test_only_reports_are_replaced(tmp_path: Path, name: str) -> None:
    """Somebody's file or link of that name stays, and nothing is written beside it; a report of
    ours is renewed."""
    given = {"a": scores(tmp_path)}
    write_report(given, tmp_path / "ours", None)
    write_report(given, tmp_path / "ours", None)
    makes: tuple[Callable[[Path], object], ...] = (
        lambda place: place.write_text("mine"),
        lambda place: place.symlink_to(tmp_path / "ours" / name),
    )
    for make in makes:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        make(out / name)
        before = (out / name).read_text()
        with pytest.raises(UserError, match="nothing is overwritten: use another out="):
            write_report(given, out, None)
        assert [path.name for path in out.iterdir()] == [name] and (
            out / name
        ).read_text() == before


def test_nothing_is_written_for_bad_scores(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"scene": 50}')
    with pytest.raises(UserError, match=r"scene is 50"):
        write_report({"a": tmp_path / "s.json"}, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
