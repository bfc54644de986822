"""``scd gallery`` on folders as scd sample writes them: what is read, what is refused, both kinds
of output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gallery_world
import pytest
from PIL import Image
from typer.testing import CliRunner

from scd_sf.cli import app
from scd_sf.files import locked
from scd_sf.tools.gallery.folders import page_of, read_folder
from scd_sf.tools.gallery.page import write_page
from scd_sf.tools.gallery.sheet import contact_sheet
from scd_sf.types import UserError


def test_prompts_models_and_facts(tmp_path: Path) -> None:
    """Equal prompts stand together; the longest video and its rate are the page's; a missing file
    stays a place."""
    one = gallery_world.write_folder(tmp_path / "teacher", ["a fox", "a hall"], fps=16)
    two = gallery_world.write_folder(tmp_path / "student", ["a hall", "a lake"], fps=16, frames=9)
    (two / "0001-00.mp4").unlink()
    page = page_of([read_folder(one), read_folder(two, "ours")], "T")
    assert [prompt.text for prompt in page.prompts] == ["a fox", "a hall", "a lake"]
    assert list(page.models) == ["teacher", "ours"] and page.models["ours"]["steps"] == "4"
    assert (
        page.models["ours"]["sha256"] == "ab" * 8 and page.models["ours"]["size"] == "[9, 32, 32]"
    )
    at = {(s.model, page.prompts[s.prompt].text): s for s in page.samples}
    assert at["ours", "a lake"].file is None and at["ours", "a lake"].fault == "missing"
    assert at["ours", "a hall"].file is not None and not at["ours", "a hall"].remark
    assert (
        at["teacher", "a fox"].facts["seed"] == "7000"
        and at["teacher", "a fox"].facts["sampler"] == "renoise"
    )
    assert at["teacher", "a fox"].brief == "4 steps · renoise · seed 7000"
    assert page.frames == 9 and page.fps == 16
    assert [prompt.tags["videos"] for prompt in page.prompts] == [
        "complete",
        "complete",
        "some are not there",
    ]


def test_the_words_of_a_sample_are_all_kept(tmp_path: Path) -> None:
    """A benchmark's name groups, the prompt that was really used is told; so are changes of prompt
    and a start."""
    one = gallery_world.write_folder(
        tmp_path / "one", ["a fox at length, in snow", "first", "go on"], samples=2
    )
    two = gallery_world.write_folder(tmp_path / "two", ["a fox otherwise", "first"])

    def more(manifest: dict[str, dict[str, dict[str, object]]]) -> None:
        for entry in manifest["videos"].values():
            entry |= (
                {"title": "a fox"},
                {"then": [[41, "second"], [81, "third"]]},
                {"start": "/data/door.png"},
            )[int(str(entry["prompt_index"]))]

    page = page_of([read_folder(gallery_world.change(folder, more)) for folder in (one, two)], "T")
    changing = "first\nfrom frame 41: second\nfrom frame 81: third"
    assert [prompt.text for prompt in page.prompts] == [
        "a fox",
        changing,
        "go on\ncontinues door.png",
    ]
    assert (
        page.prompts[0].words == ("a fox at length, in snow", "a fox otherwise")
        and not page.prompts[1].words
    )
    own = [sample.facts["prompt"] for sample in page.samples if sample.prompt == 0]
    assert own == ["a fox at length, in snow"] * 2 + ["a fox otherwise"]
    text = write_page(page, tmp_path / "page.html").read_text()
    assert (
        "a fox at length, in snow" in text
        and "a fox otherwise" in text
        and "from frame 81: third" in text
    )
    assert 'data-name="one, sample 2"' in text and 'data-name="two"' in text, (
        "samples are told apart"
    )


def test_order_is_by_prompt_not_by_name(tmp_path: Path) -> None:
    """VBench's files are named by their prompts."""
    root = gallery_world.write_folder(tmp_path / "x", ["zebra", "ant"])

    def rename(manifest: dict[str, dict[str, object]]) -> None:
        manifest["videos"] = {f"{e['prompt']}-0.mp4": e for e in manifest["videos"].values()}  # type: ignore[index]

    for old, new in (("0000-00.mp4", "zebra-0.mp4"), ("0001-00.mp4", "ant-0.mp4")):
        (root / old).rename(root / new)
    page = page_of([read_folder(gallery_world.change(root, rename))], "T")
    assert [prompt.text for prompt in page.prompts] == ["zebra", "ant"]


def test_an_unfinished_run_is_shown(tmp_path: Path) -> None:
    """Its manifest lists nothing yet; the records do."""
    root = gallery_world.write_folder(tmp_path / "x", ["a fox", "a hall"])
    entries = json.loads((root / "manifest.json").read_text())["videos"]
    (root / ".done").mkdir()
    (root / ".done" / "0001-00.mp4.json").write_text(json.dumps(entries["0001-00.mp4"]))
    page = page_of([read_folder(gallery_world.change(root, lambda m: m["videos"].clear()))], "T")
    assert [prompt.text for prompt in page.prompts] == ["a hall"] and page.samples[0].facts[
        "seed"
    ] == "7001"


def test_damaged_changed_and_disguised_videos(tmp_path: Path) -> None:
    """No video at all, a torn one, a playlist named mp4, and a good video that is not the one that
    was sampled."""
    root = gallery_world.write_folder(tmp_path / "x", ["a", "b", "c", "d"], frames=9)
    (root / "0000-00.mp4").write_bytes(b"not a video")
    (root / "0001-00.mp4").write_bytes((root / "0001-00.mp4").read_bytes()[:200])
    (root / "0002-00.mp4").write_text(
        f"#EXTM3U\n#EXTINF:1,\n{root / '0003-00.mp4'}\n#EXT-X-ENDLIST\n"
    )
    good = gallery_world.write_folder(tmp_path / "y", ["other"], frames=7)
    (root / "0003-00.mp4").write_bytes((good / "0000-00.mp4").read_bytes())
    page = page_of([read_folder(root)], "T")
    assert [sample.fault for sample in page.samples] == ["damaged", "damaged", "damaged", ""]
    assert [sample.file is None for sample in page.samples] == [True, True, True, False]
    assert page.samples[3].remark == "changed since it was sampled" and page.frames == 7


@pytest.mark.parametrize("single", [True, False])
def test_the_command(tmp_path: Path, single: bool) -> None:
    for name in ("teacher", "student"):
        gallery_world.write_folder(tmp_path / name, ["a fox", "a hall", "a lake"])
    (tmp_path / "student" / "0000-00.mp4").unlink()
    (tmp_path / "student" / "0001-00.mp4").write_bytes(b"x")
    (tmp_path / "student" / "0002-00.mp4").write_bytes(
        (tmp_path / "teacher" / "0001-00.mp4").read_bytes()
    )
    out = tmp_path / ("all.html" if single else "all")
    given = [
        str(tmp_path / "teacher"),
        str(tmp_path / "student"),
        "--out",
        str(out),
        "--names",
        "Wan, SCD",
    ]
    result = CliRunner().invoke(app, ["gallery", *given, "--sheet", str(tmp_path / "sheet.png")])
    assert result.exit_code == 0, result.output
    for said in (
        "3 prompts, 2 models, 6 videos",
        "1 video missing and marked so, such as SCD/0000-00.mp4",
        "1 video damaged and marked so, such as SCD/0001-00.mp4",
        "changed since sampling",
        "3 of 3 prompts",
    ):
        assert said in result.output.replace("\n", "")
    text = (out if single else out / "index.html").read_text()
    assert text.count('data-state="missing"') == 1 and text.count('data-state="damaged"') == 1
    assert "http://" not in text and "https://" not in text
    assert text.count('id="video-') == (3 if single else 0)  # equal videos are kept once
    assert single or len(list((out / "videos").iterdir())) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    result = CliRunner().invoke(app, ["gallery", *given[:-1], "only one"])
    assert isinstance(result.exception, UserError) and "1 names for 2 folders" in str(
        result.exception
    )


def test_only_a_gallery_is_overwritten(tmp_path: Path) -> None:
    """Files and folders of others and links stay; a gallery of ours is renewed, also one that was
    interrupted, and old videos leave."""
    page = page_of(
        [read_folder(gallery_world.write_folder(tmp_path / "x", ["a fox", "a hall"]))], "T"
    )
    for name, file in (("site", "index.html"), ("samples", "videos/00000.mp4")):
        place = tmp_path / name / file
        place.parent.mkdir(parents=True)
        place.write_text("mine")
        with pytest.raises(UserError, match="give --out another folder"):
            write_page(page, tmp_path / name)
        assert (
            place.read_text() == "mine"
            and len([p for p in (tmp_path / name).rglob("*") if p.is_file()]) == 1
        )
    for make, name in ((write_page, "page.html"), (contact_sheet, "sheet.png")):
        assert make(page, tmp_path / name) == make(page, tmp_path / name)
        other, link = tmp_path / f"other {name}", tmp_path / f"link {name}"
        other.write_bytes(b"mine")
        link.symlink_to(tmp_path / name)
        for place in (other, link):
            with pytest.raises(UserError, match="nothing is overwritten"):
                make(page, place)
        assert other.read_bytes() == b"mine"
    out = tmp_path / "gallery"
    write_page(page, out)
    assert len(list((out / "videos").glob("*.mp4"))) == 2
    shutil.rmtree(out / "videos")  # as if it had been killed before its videos
    write_page(page, out)
    (out / "videos" / "notes.txt").write_text("mine")
    fewer = page_of([read_folder(gallery_world.write_folder(tmp_path / "y", ["a fox"]))], "T")
    write_page(fewer, out)
    names = sorted(path.name for path in (out / "videos").iterdir())
    assert len(names) == 2 and "notes.txt" in names
    assert (
        next(n for n in names if n != "notes.txt").removesuffix(".mp4")
        in (out / "index.html").read_text()
    )
    with locked(out, "this gallery"), pytest.raises(UserError, match="is at work in it"):
        write_page(page, out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("settings"), "settings"),
        (lambda m: m["settings"].update(fps="fast"), "settings.fps is 'fast'"),
        (lambda m: m["settings"].update(fps=float("nan")), "NaN is not a JSON number"),
        (lambda m: m["videos"].update({"../../etc/x.mp4": {"prompt": "p"}}), "which leaves"),
        (lambda m: m["videos"].update({"/etc/x.mp4": {"prompt": "p"}}), "which leaves"),
        (lambda m: m["videos"].update({"a\0.mp4": {"prompt": "p"}}), "no file name"),
        (lambda m: m["videos"].update({"\ud800.mp4": {"prompt": "p"}}), "surrogates not allowed"),
        (lambda m: m["videos"].update({"x" * 5000 + ".mp4": {"prompt": "p"}}), "no file name"),
        (lambda m: m["videos"].update({"0000-00.mp4": {"prompt": 3}}), "prompt"),
        (lambda m: m["videos"].update({"0000-00.mp4": "text"}), "Expected"),
        (lambda m: m["videos"].update({"javascript:alert(1)": {"prompt": "p"}}), "not an mp4 file"),
        (lambda m: m["videos"].clear(), "hold no videos"),
    ],
)
def test_manifests_are_not_trusted(tmp_path: Path, change: object, said: str) -> None:
    root = gallery_world.change(gallery_world.write_folder(tmp_path / "x", ["a fox"]), change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        page_of([read_folder(root)], "T")


def test_foreign_folders_links_and_equal_names(tmp_path: Path) -> None:
    root = gallery_world.write_folder(tmp_path / "x", ["a fox"])
    (root / "0000-00.mp4").unlink()
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (root / "0000-00.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(UserError, match="which leaves"):
        read_folder(root)
    one = gallery_world.write_folder(tmp_path / "a" / "x", ["a fox"])
    with pytest.raises(UserError, match="two folders are named 'x'; give --names"):
        page_of([read_folder(one), read_folder(one)], "T")
    with pytest.raises(UserError, match=r"manifest.json.*give folders that scd sample"):
        read_folder(tmp_path / "nowhere")
    for text in ("[" * 200_000, "[]", '{"format": "clips", "version": 1}'):
        (root / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest.json.*give folders that scd sample"):
            read_folder(root)
