"""Lists of prompts: what a row may say, what ends a line, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scd_sf.data.prompt_files import LINE_BYTES, PromptFile, PromptRow, read_prompt_file
from scd_sf.data.prompt_list import PromptList
from scd_sf.files import sha256_file
from scd_sf.types import UserError


def test_a_row_may_name_its_seed(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    jsonl.write_text('{"prompt": "a", "seed": 7}\n{"prompt": "b"}\n{"prompt": "c", "seed": 0}\n')
    table.write_text("prompt,seed\na,7\nb,\nc,0\n")
    for file in (jsonl, table):
        assert read_prompt_file(file) == [
            PromptRow("a", seed=7),
            PromptRow("b"),
            PromptRow("c", seed=0),
        ]


@pytest.mark.parametrize("seed", ["-1", "1.5", "true", '"x"', str(2**63), "[1]", "1" * 19 + "0"])
def test_impossible_seeds_are_named(tmp_path: Path, seed: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "a", "seed": {seed}}}\n')
    with pytest.raises(UserError, match=r"p\.jsonl: line 1: 'seed' is .*a whole number from 0 to"):
        read_prompt_file(file)


LINES = ["a cat\u2028walks", "a\u0085dog \x0b runs", "rain\rand wind"]


def forms(folder: Path) -> list[Path]:
    """The same three prompts as text, csv and jsonl, with a byte order mark and both ends of
    lines."""
    texts = {
        "p.txt": "\r\n\n".join(LINES) + "\r\n",
        "p.csv": "prompt,other\r\n" + "".join(f"{line},1\n" for line in LINES),
        "p.jsonl": "\r\n".join(json.dumps({"prompt": line}, ensure_ascii=False) for line in LINES),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    return [folder / name for name in texts]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """prompts_u2028.txt and prompts_bom_crlf.txt of the cases, in every format."""
    for file in forms(tmp_path):
        assert [row.prompt for row in read_prompt_file(file)] == LINES, file.name
    (tmp_path / "mac.csv").write_bytes(b"uuid,prompt\r1,a cat\r2,a dog\r")
    with pytest.raises(UserError, match=r"mac\.csv: no column 'prompt'"):
        read_prompt_file(tmp_path / "mac.csv")
    (tmp_path / "bom.txt").write_bytes("\ufeffa cat\r\na dog\r\n".encode())
    assert [row.prompt for row in read_prompt_file(tmp_path / "bom.txt")] == ["a cat", "a dog"]


def test_rows_are_found_again_by_their_offsets(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(
        'x,prompt,seed\n\n1,"two\nlines, ""quoted""",3\n2,plain\n,"",\n'.replace(
            ',"",\n', ",last,\n"
        )
    )
    for file in [*forms(tmp_path), tmp_path / "q.csv"]:
        table = PromptFile(file)
        rows = list(table.rows())
        assert [table.row(offset) for offset, _ in reversed(rows)] == [
            row for _, row in reversed(rows)
        ]
        assert table.sha256 == sha256_file(file)
    assert [row for _, row in rows] == [
        PromptRow('two\nlines, "quoted"', seed=3),
        PromptRow("plain"),
        PromptRow("last"),
    ]
    file.write_text("prompt\nother\n")
    with pytest.raises(UserError, match=r"q\.csv: was changed while it was in use"):
        table.row(rows[0][0])


REFUSED = {
    "negative.jsonl": (
        '{"prompt": "a", "negative": "b"}',
        r"line 1: unknown key 'negative'; a row may have prompt, ",
    ),
    "frames.csv": ("prompt,frames\na,3\n", r"column 'frames' is not read"),
    "Seed.csv": ("prompt, Seed\na,3\n", r"column ' Seed' is not read"),
    "commas.csv": (
        "prompt\na cat, red\n",
        r"line 2 has 2 columns instead of 1; put texts that have commas into quotes",
    ),
    "twice.csv": ("prompt,prompt\na,b\n", r"column 'prompt' is there twice"),
    "nul.txt": ("a\0b\n", r"line 1 holds a NUL"),
    "nul.jsonl": (r'{"prompt": "a\u0000b"}', r"line 1: 'prompt' is 'a\\x00b', not a prompt"),
    "half.jsonl": ('{"prompt": "ok"}\n{"prompt": "a \\ud800"}', r"line 2: not JSON"),
    "deep.jsonl": ('{"prompt": "a", "tags": ' + "[" * 9999 + "]" * 9999 + "}", r"line 1: not JSON"),
    "open.csv": ('prompt\nok\n"left in\nand on\n', r"line 3: unexpected end of data"),
    "field.csv": ("prompt\n" + "a" * 200_000, r"line 2: field larger than field limit"),
    "long.txt": ("ok\n" + "a" * (LINE_BYTES + 1), r"line 2 has more than 1,048,576 bytes"),
    "list.json": ('[{"prompt": "a"}]', r"\.json is no list of prompts; use \.txt"),
    "pointer.txt": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        r"a Git LFS pointer",
    ),
    "pointer.csv": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        r"a Git LFS pointer",
    ),
    "held.jsonl": ('{"prompt": "a", "held_out": "no"}', r"'held_out' is 'no'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    text, words = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_prompt_file(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))


def test_what_is_no_file(tmp_path: Path) -> None:
    """Nothing is waited for, and nothing is read into memory."""
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(10 * 2**30)
    for path, words in (
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "pipe.txt", "not a regular file"),
        (tmp_path / "sparse.txt", "10,737,418,240 bytes"),
        (tmp_path, "a folder without report.json"),
        (tmp_path / "none.txt", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            read_prompt_file(path)
    with pytest.raises(UserError, match=r"line 1 has more than"):
        list(PromptFile(tmp_path / "sparse.txt").rows())


def test_what_tools_and_collections_say_beside_a_prompt_is_passed_over(tmp_path: Path) -> None:
    row = {
        "uuid": "u",
        "prompt": "a",
        "original": None,
        "time": "",
        "scores": {"toxicity": 0.0},
        "extended": True,
    }
    (tmp_path / "p.jsonl").write_text(
        json.dumps(row | {"refused": [], "id": "x", "held_out": True, "tags": {}})
    )
    assert read_prompt_file(tmp_path / "p.jsonl") == [PromptRow("a", uuid="u", held_out=True)]
    (tmp_path / "p.csv").write_text("uuid,prompt,time,toxicity,part,anything\nu,a,now,0.1,,1\n")
    assert read_prompt_file(tmp_path / "p.csv") == [PromptRow("a", uuid="u")]


def test_a_video_to_make_anew(tmp_path: Path) -> None:
    """A jsonl row's, relative to the list; a csv file's column of that name is one of its own. Where
    a prompt is all, it is refused."""
    file, other = tmp_path / "p.jsonl", tmp_path / "p.csv"
    file.write_text('{"prompt": "a", "video": "b.mp4"}\n{"prompt": "c"}\n')
    rows = [PromptRow("a", video=str(tmp_path / "b.mp4")), PromptRow("c")]
    assert read_prompt_file(file) == rows
    other.write_text("video,prompt\nb.mp4,a\n")
    assert read_prompt_file(other) == [PromptRow("a")]
    with pytest.raises(UserError, match="prompt 1 has 'video', but here a prompt is all"):
        PromptList(file)
    for row, words in (
        ('{"prompt": "a", "video": 3}', "'video' is 3; it must be the path of a video"),
        ('{"prompt": "a", "video": "b.mp4", "start": "c.png"}', "has 'start' and 'video'"),
    ):
        file.write_text(row)
        with pytest.raises(UserError, match=words):
            read_prompt_file(file)


def test_a_header_of_many_columns_is_quick(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        ",".join(["prompt", *(f"c{n}" for n in range(40_000))]) + "\na\n"
    )
    assert read_prompt_file(tmp_path / "p.csv") == [PromptRow("a")]
