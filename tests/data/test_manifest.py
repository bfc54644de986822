"""JSON files of other people: whatever is wrong is an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from scd_sf.data.manifest import read_json, read_jsonl
from scd_sf.types import UserError

WRONG = {"cut": b'{"a": 1', "list": b"[]", "deep": b"[" * 200_000, "bytes": b'"\xff"'}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, wrong: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 2}\n\n' + wrong)
    with pytest.raises(UserError, match=r"rows\.jsonl.*; make it again"):
        read_jsonl(file, "make it again")
    file.write_bytes(wrong)
    with pytest.raises(UserError, match=r"rows\.jsonl.*; make it again"):
        read_json(file, "make it again")
