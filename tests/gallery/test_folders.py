"""``scd gallery`` on folders as scd sample writes them: what is read, what is refused, both kinds of output."""

from __future__ import annotations

import json
from pathlib import Path

import gallery_world
import pytest
from PIL import Image
from typer.testing import CliRunner

from scd_sf.cli import app
from scd_sf.gallery.folders import page_of, read_folder
from scd_sf.types import UserError


def test_prompts_models_and_facts(tmp_path: Path) -> None:
    """Equal prompts stand together; the longest video and its rate are the page's; a missing file stays a place."""
    one = gallery_world.write_folder(tmp_path / "teacher", ["a fox", "a hall"], fps=16)
    two = gallery_world.write_folder(tmp_path / "student", ["a hall", "a lake"], fps=16, frames=9)
    (two / "0001-00.mp4").unlink()
    page = page_of([read_folder(one), read_folder(two, "ours")], "T")
    assert {prompt.text for prompt in page.prompts} == {"a fox", "a hall", "a lake"}
    assert list(page.models) == ["teacher", "ours"] and page.models["ours"]["steps"] == "4"
    assert page.models["ours"]["sha256"] == "ab" * 8
    at = {(s.model, page.prompts[s.prompt].text): s for s in page.samples}
    assert at["ours", "a lake"].file is None and at["ours", "a hall"].file is not None
    assert at["teacher", "a fox"].facts["seed"] == "7000" and at["teacher", "a fox"].facts["sampler"] == "renoise"
    assert page.frames == 9 and page.fps == 16


@pytest.mark.parametrize("single", [True, False])
def test_the_command(tmp_path: Path, single: bool) -> None:
    for name in ("teacher", "student"):
        gallery_world.write_folder(tmp_path / name, ["a fox", "a hall"])
    (tmp_path / "student" / "0000-00.mp4").unlink()
    out = tmp_path / ("all.html" if single else "all")
    given = [str(tmp_path / "teacher"), str(tmp_path / "student"), "--out", str(out), "--names", "Wan, SCD"]
    result = CliRunner().invoke(app, ["gallery", *given, "--sheet", str(tmp_path / "sheet.png")])
    assert result.exit_code == 0, result.output
    assert "2 prompts, 2 models, 4 videos" in result.output and "1 of the videos are missing" in result.output
    text = (out if single else out / "index.html").read_text()
    assert (
        text.count('<div class="frame" data-state="missing"') == 1 and "http://" not in text and "https://" not in text
    )
    assert text.count('id="video') == (3 if single else 0)
    assert single or sorted(p.name for p in (out / "videos").iterdir()) == [f"{i:05d}.mp4" for i in range(3)]
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = sheet.convert("RGB").getcolors(1 << 20)
        assert sheet.width == 2 * 168 + 8 and colours is not None and len(colours) > 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("settings"), "no sample manifest"),
        (lambda m: m["settings"].update(fps="fast"), "settings.fps is 'fast'"),
        (lambda m: m["videos"].update({"../../etc/x.mp4": {"prompt": "p"}}), "not an mp4 file inside the folder"),
        (lambda m: m["videos"].update({"/etc/x.mp4": {"prompt": "p"}}), "not an mp4 file inside the folder"),
        (lambda m: m["videos"].update({"a\0.mp4": {"prompt": "p"}}), "not an mp4 file inside the folder"),
        (lambda m: m["videos"].update({"0000-00.mp4": {"prompt": 3}}), "has no prompt"),
        (lambda m: m["videos"].update({"javascript:alert(1)": {"prompt": "p"}}), "not an mp4 file inside"),
        (lambda m: m["videos"].clear(), "hold no videos"),
    ],
)
def test_manifests_are_not_trusted(tmp_path: Path, change: object, said: str) -> None:
    root = gallery_world.write_folder(tmp_path / "x", ["a fox"])
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)  # type: ignore[operator]
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        page_of([read_folder(root)], "T")


def test_links_out_of_the_folder_and_equal_names(tmp_path: Path) -> None:
    root = gallery_world.write_folder(tmp_path / "x", ["a fox"])
    (root / "0000-00.mp4").unlink()
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (root / "0000-00.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(UserError, match="inside the folder"):
        read_folder(root)
    one = gallery_world.write_folder(tmp_path / "a" / "x", ["a fox"])
    with pytest.raises(UserError, match="two folders are named 'x'; give --names"):
        page_of([read_folder(one), read_folder(one)], "T")
    with pytest.raises(UserError, match=r"manifest.json.*give folders that scd sample"):
        read_folder(tmp_path / "nowhere")
