"""Lists of prompts: VidProM's csv with all that RFC 4180 allows, jsonl, txt; damage is named by row and line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from scd_sf.prompt_filter.chain import FilterConfig
from scd_sf.prompt_filter.report import run_filter
from scd_sf.prompt_filter.table import SCORES, scan
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
    body, message = BAD[name]
    path = write(tmp_path / "a.csv", body)
    with pytest.raises(UserError) as caught:
        run_filter(FilterConfig((str(path),), str(tmp_path / "out"), workers=1))
    assert f"a.csv: {message}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


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
        ('{"prompt": "\\ud800", "uuid": "x"}', "line 3: half of a surrogate pair"),
        ('{"prompt": "c", "uuid": 3}', "line 3: 'uuid' is 3"),
    ]:
        with pytest.raises(UserError) as caught:
            scan(write(tmp_path / "a.jsonl", body + line + "\n", ""))
        assert message in str(caught.value)
