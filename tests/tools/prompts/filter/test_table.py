"""Lists of prompts: VidProM's csv with all that RFC 4180 allows, jsonl, txt; damaged rows are named
and left out."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path

import pytest

from scd_sf.data.prompt_files import SCORES
from scd_sf.tools.prompts.filter.table import BadRows, read_list
from scd_sf.types import UserError

HEADER = "uuid,prompt,time," + ",".join(SCORES) + "\n"
GOOD = 'u1,"a, ""b""\nc",Sun Sep  3 12:27:44 2023,0.1,0,1e-5,0,0,1\n'


def write(path: Path, body: str | bytes, header: str = HEADER) -> Path:
    path.write_bytes(header.encode() + (body if isinstance(body, bytes) else body.encode()))
    return path


def test_csv_is_read_as_pythons_reader_reads_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = ["a", " ", ",", '"', "\n", "\r\n", "\r", "é", "雨", "\u2028", ";", "'"]
    rows = [
        ["".join(rng.choices(pieces, k=rng.randint(0, 12))), f"u{i}", *["0.5"] * 6, f"t{i}"]
        for i in range(2000)
    ]
    path, bad = tmp_path / "a.csv", BadRows()
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["prompt", "uuid", *SCORES, "time"], *rows])
    table = read_list(path, bad)
    with path.open(encoding="utf-8-sig", newline="") as file:
        wanted = list(csv.DictReader(file))
    assert table["prompt"].to_list() == [row["prompt"] for row in wanted] and bad.count == 0
    assert table["uuid"].to_list() == [row["uuid"] for row in wanted] and table[
        "row"
    ].to_list() == [*range(1, 2001)]
    assert table["time"][7] == "t7" and table["threat"].sum() == 1000
    path.write_bytes(path.read_bytes() + b"too,few\r\n")  # now by Python's reader
    assert read_list(path, bad).equals(table) and bad.count == 1


def test_a_carriage_return_alone_ends_no_line(tmp_path: Path) -> None:
    good, bad = b"u1,a cat\ra dog,t,0,0,0,0,0,0\nu2,rain,t,0,0,0,0,0,0\n", BadRows()
    for damaged in (b"", b"too,few\n"):  # read by polars, and by Python's reader
        table = read_list(write(tmp_path / "a.csv", good + damaged), bad)
        assert table["prompt"].to_list() == ["a cat\ra dog", "rain"]
    assert bad.count == 1
    with pytest.raises(UserError, match="no column 'prompt' in its header"):
        read_list(write(tmp_path / "mac.csv", b"", "uuid,prompt\r1,a cat\r"), bad)


BAD: dict[str, tuple[str | bytes, str]] = {
    "few columns": (GOOD + "u2,x,t,0,0\n", "row 2"),
    "many columns": (GOOD + "u2,x,t,0,0,0,0,0,0,0\n", "row 2 (line 4): 10 columns instead of 9"),
    "a word": (
        GOOD + GOOD + "u2,x,t,0,0,much,0,0,0\n",
        "row 3 (line 6): 'identity_attack' is 'much', not a number",
    ),
    "nothing": (
        GOOD + "u2,x,t,0,0,,0,0,0\n",
        "row 2: 'identity_attack' is None, not a number from 0 to 1",
    ),
    "no score": (GOOD + "u2,x,t,,,,,,\n", "row 2: 'toxicity' is None, not a number from 0 to 1"),
    "nan": (GOOD + "u2,x,t,0,nan,0,0,0,0\n", "row 2: 'obscene' is nan, not a number from 0 to 1"),
    "too large": (GOOD + "u2,x,t,0,0,0,0,0,1.5\n", "row 2: 'sexual_explicit' is 1.5"),
    "no uuid": (GOOD + ",x,t,0,0,0,0,0,0\n", "row 2: 'uuid' is None, not a name"),
    "latin-1": (
        GOOD.encode() + "u2,é,t,0,0,0,0,0,0\n".encode("latin-1"),
        "row 2 (line 4): not UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_csv_rows_are_named_and_left_out(tmp_path: Path, name: str) -> None:
    body, message = BAD[name]
    bad = BadRows()
    table = read_list(write(tmp_path / "a.csv", body), bad)
    assert (
        bad.count == 1
        and f"a.csv: {message}" in bad.first_problem
        and "\n" not in bad.first_problem
    )
    assert set(table["uuid"]) == {"u1"} and table["prompt"][0] == 'a, "b"\nc'
    assert csv.field_size_limit() == 131072, "the limit is the whole process's"


@pytest.mark.parametrize("row", ['u2,"x,t,0,0,0,0,0,0\n', 'u2,"x"y,t,0,0,0,0,0,0\n'])
def test_where_the_next_row_begins_must_be_known(tmp_path: Path, row: str) -> None:
    with pytest.raises(UserError, match=r"a\.csv: row 2 \(line 4\): quotes do not match"):
        read_list(write(tmp_path / "a.csv", GOOD + row), BadRows())


def test_what_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(10 * 2**30)
    write(tmp_path / "b.csv", "", HEADER.replace("threat", "thread"))
    write(tmp_path / "c.csv", "", "uuid,prompt,uuid\n")
    for name, words in (
        ("/dev/zero", "not a regular file"),
        ("pipe.txt", "not a regular file"),
        ("sparse.txt", "line 1: more than 1,048,576 bytes"),
        ("", "a folder without report.json"),
        ("a.parquet", r"\.parquet is not read"),
        ("none.csv", r"none\.csv: cannot be read \(.*No such file"),
        ("b.csv", r"no column 'threat' in its header"),
        ("c.csv", r"column 'uuid' is there twice"),
    ):
        with pytest.raises(UserError, match=words):
            read_list(tmp_path / name, BadRows())


def test_text_jsonl_and_csv_without_scores(tmp_path: Path) -> None:
    bad = BadRows()
    plain = read_list(write(tmp_path / "b.csv", "u1,x\n", "uuid,prompt\n"), bad)
    assert plain.row(0) == (1, "u1", "x", "", *[None] * 6)
    text = write(
        tmp_path / "a.txt",
        "\ufeffa cat\n\n  a dog \r\na\u2028b\na cat\n".encode() + b"a \xff\n",
        "",
    )
    table = read_list(text, bad)
    assert table["prompt"].to_list() == ["a cat", "a dog", "a\u2028b", "a cat"]
    assert table["uuid"][0] == table["uuid"][3] != table["uuid"][1] and len(table["uuid"][0]) == 36
    assert bad.count == 1 and "a.txt: line 6: not UTF-8" in bad.first_problem

    scored = dict.fromkeys(SCORES, 0.25)
    lines = [
        {"uuid": "u1", "prompt": "a\u2028cat", **scored},
        {"prompt": "b", "scores": scored | {"insult": 1}},
    ]
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    table = read_list(write(tmp_path / "a.jsonl", body, ""), BadRows())
    assert table["prompt"].to_list() == ["a\u2028cat", "b"] and table["insult"].to_list() == [
        0.25,
        1.0,
    ]
    for line, message in [
        ("{", "line 3: not JSON"),
        ('["a"]', 'line 3: not {"prompt": "..."}'),
        ('{"prompt": 5}', 'line 3: not {"prompt": "..."}'),
        ('{"prompt": "c"}', "row 3: 'toxicity' is None"),
        ('{"prompt": "c", "toxicity": 0.5}', "row 3: 'obscene' is None"),
        ('{"prompt": "c", "toxicity": true}', "line 3: 'toxicity' is no number"),
        ('{"prompt": "\\ud800", "uuid": "x"}', "line 3: not JSON"),
        ('{"prompt": "c", "uuid": 3}', "line 3: 'uuid' is 3"),
    ]:
        bad = BadRows()
        assert len(read_list(write(tmp_path / "a.jsonl", body + line + "\n", ""), bad)) == 2
        assert bad.count == 1 and message in bad.first_problem
