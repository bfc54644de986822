"""Lists of prompts: VidProM's csv with all that RFC 4180 allows, jsonl, txt; damage is named by row and line."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from scd_sf.data.prompt_files import SCORES
from scd_sf.files import read_json
from scd_sf.tools.prompts.filter.chain import FilterConfig
from scd_sf.tools.prompts.filter.report import run_filter
from scd_sf.tools.prompts.filter.table import scan
from scd_sf.types import UserError

HEADER = "uuid,prompt,time," + ",".join(SCORES) + "\n"
GOOD = 'u1,"a, ""b""\nc",Sun Sep  3 12:27:44 2023,0.1,0,1e-5,0,0,1\n'


def write(path: Path, body: str | bytes, header: str = HEADER) -> Path:
    path.write_bytes(header.encode() + (body if isinstance(body, bytes) else body.encode()))
    return path


def test_csv_is_read_as_pythons_reader_reads_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = ["a", " ", ",", '"', "\n", "\r\n", "é", "雨", "\u2028", ";", "'"]
    rows = [["".join(rng.choices(pieces, k=rng.randint(0, 12))), f"u{i}", *["0.5"] * 6, f"t{i}"] for i in range(2000)]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["prompt", "uuid", *SCORES, "time"], *rows])
    read = scan(path).collect()
    with path.open(encoding="utf-8-sig", newline="") as file:
        wanted = list(csv.DictReader(file))
    assert [text or "" for text in read["prompt"]] == [row["prompt"] for row in wanted]
    assert read["uuid"].to_list() == [row["uuid"] for row in wanted] and read["row"].to_list() == list(range(1, 2001))
    assert read["time"][7] == "t7" and read["threat"].sum() == 1000


BAD = {
    "few columns": (GOOD + "u2,x,t,0,0\n", "row 2 (line 4): 5 columns instead of 9"),
    "many columns": (GOOD + "u2,x,t,0,0,0,0,0,0,0\n", "row 2 (line 4): 10 columns instead of 9"),
    "a word": (GOOD + GOOD + "u2,x,t,0,0,much,0,0,0\n", "row 3 (line 6): 'identity_attack' is 'much', not a number"),
    "nothing": (GOOD + "u2,x,t,0,0,,0,0,0\n", "row 2 (line 4): 'identity_attack' is '', not a number"),
    "nan": (GOOD + "u2,x,t,0,nan,0,0,0,0\n", "row 2 (line 4): 'obscene' is 'nan', not a number from 0 to 1"),
    "too large": (GOOD + "u2,x,t,0,0,0,0,0,1.5\n", "row 2 (line 4): 'sexual_explicit' is '1.5'"),
    "no uuid": (GOOD + ",x,t,0,0,0,0,0,0\n", "row 2 (line 4): 'uuid' is empty"),
    "blank line": (GOOD + "\n" + GOOD, "row 2 (line 4): 0 columns instead of 9"),
    "open quote": (GOOD + 'u2,"x,t,0,0,0,0,0,0\n', "row 2 (line 4): quotes do not match"),
    "text after a quote": (GOOD + 'u2,"x"y,t,0,0,0,0,0,0\n', "row 2 (line 4): quotes do not match"),
    "quote inside": (GOOD + 'u2,x"y,t,0,0,0,0,0,0\n' + GOOD, "row 2 (line 4): 'prompt' has a quote but does not begin"),
    "latin-1": (GOOD.encode() + "u2,é,t,0,0,0,0,0,0\n".encode("latin-1"), "row 2 (line 4): 'prompt' is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_csv_rows(tmp_path: Path, name: str) -> None:
    """Named by row and line where a list must be whole; the filter counts them and leaves them out, where it can tell
    where the next row begins."""
    body, message = BAD[name]
    raw = body if isinstance(body, bytes) else body.encode()
    path = write(tmp_path / "a.csv", raw.replace(b"1e-5,0,0,1", b"1e-5,0,0,0"))
    if "quotes do not match" not in message:
        report = filtered(path)
        assert f"a.csv: {message}" in report["steps"][0]["counts"]["first"]
        assert report["steps"][0]["rows_in"] == 1 + report["steps"][0]["rows_out"] and report["kept"] == 1
        return
    with pytest.raises(UserError) as caught:
        filtered(path)
    assert f"a.csv: {message}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def filtered(path: Path) -> dict[str, Any]:
    """The filter's report, with nothing dropped for what it says."""
    cfg = FilterConfig(
        (str(path),), f"{path.parent}/out", min_words=0, letters=0.0, nsfw=0.5, language_score=1.0, workers=1
    )
    return read_json(run_filter(cfg), "")


def test_bad_rows_of_other_lists_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a cat\n\xff\xfe\na &#" + b"9" * 5000 + b"; dog\n")
    report = filtered(tmp_path / "a.txt")
    assert report["steps"][0]["rows_out"] == 2 and "a.txt: line 2: not UTF-8" in report["steps"][0]["counts"]["first"]
    lines = ['{"prompt": "a cat"}', '{"prompt": "a \\ud800"}', "[1]", '{"prompt": "b", "time": 5}', "{" * 9999]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "out").rename(tmp_path / "first")
    counts = filtered(tmp_path / "b.jsonl")["steps"][0]["counts"]
    assert counts["rows that cannot be read"] == 4 and "b.jsonl: line 2: not JSON" in counts["first"]
    (tmp_path / "out").rename(tmp_path / "second")
    (tmp_path / "c.jsonl").write_text("\n".join(lines * 3))
    with pytest.raises(UserError, match=r"12 of 15 rows cannot be read; the first: .*c\.jsonl: line 2"):
        filtered(tmp_path / "c.jsonl")


def test_what_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(10 * 2**30)
    for path, words in (
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "pipe.txt", "not a regular file"),
        (tmp_path / "sparse.txt", "line 1: more than 1,048,576 bytes"),
        (tmp_path, "a folder without report.json"),
        (tmp_path / "a.parquet", r"\.parquet is not read"),
    ):
        with pytest.raises(UserError, match=words):
            scan(path)
    wide = write(tmp_path / "a.csv", "", "uuid,prompt," + ",".join(f"c{n}" for n in range(40_000)) + "\n")
    assert len(scan(wide).collect()) == 0


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'threat' in its header"):
        scan(write(tmp_path / "a.csv", "", HEADER.replace("threat", "thread")))
    with pytest.raises(UserError, match=r"column 'uuid' is there twice"):
        scan(write(tmp_path / "a.csv", "", "uuid,prompt,uuid\n"))
    with pytest.raises(UserError, match=r"none\.csv: cannot be read \(No such file"):
        scan(tmp_path / "none.csv")
    plain = scan(write(tmp_path / "b.csv", "u1,x\n", "uuid,prompt\n")).collect()
    assert plain.row(0) == (1, "u1", "x", "", *[None] * 6)

    text = scan(write(tmp_path / "a.txt", "\ufeffa cat\n\n  a dog \r\na\u2028b\na cat\n", "")).collect()
    assert text["prompt"].to_list() == ["a cat", "a dog", "a\u2028b", "a cat"]
    assert text["uuid"][0] == text["uuid"][3] != text["uuid"][1] and len(text["uuid"][0]) == 36
    with pytest.raises(UserError, match=r"a\.txt: line 2: not UTF-8"):
        scan(write(tmp_path / "a.txt", b"a cat\na \xff\n", ""))


def test_jsonl(tmp_path: Path) -> None:
    scored = dict.fromkeys(SCORES, 0.25)
    lines = [{"uuid": "u1", "prompt": "a\u2028cat", **scored}, {"prompt": "b", "scores": scored | {"insult": 1}}]
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    read = scan(write(tmp_path / "a.jsonl", body, "")).collect()
    assert read["prompt"].to_list() == ["a\u2028cat", "b"] and read["insult"].to_list() == [0.25, 1.0]
    for line, message in [
        ("{", "line 3: not JSON"),
        ('["a"]', 'line 3: not {"prompt": "..."}'),
        ('{"prompt": 5}', 'line 3: not {"prompt": "..."}'),
        ('{"prompt": "c"}', "line 3: some lines have scores and some have not"),
        ('{"prompt": "c", "toxicity": 0.5}', "line 3: 'obscene' is None"),
        ('{"prompt": "c", "toxicity": true}', "line 3: 'toxicity' is True"),
        ('{"prompt": "\\ud800", "uuid": "x"}', "line 3: not JSON"),
        ('{"prompt": "c", "uuid": 3}', "line 3: 'uuid' is 3"),
    ]:
        with pytest.raises(UserError) as caught:
            scan(write(tmp_path / "a.jsonl", body + line + "\n", ""))
        assert message in str(caught.value)
