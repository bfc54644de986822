"""The one reader of manifests and index files: format and version, hashes of rows or bytes, exact
fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scd_sf.data.manifest import BUILDING, MANIFEST, Format, read_index, write_index
from scd_sf.files import sha256_file, write_json
from scd_sf.tensor_files import dtype_name, dtype_of
from scd_sf.types import UserError

SETS = Format("sets", 2, "no such file; make it first")


@dataclass(frozen=True)
class Item:
    id: str
    tags: tuple[str, ...] = ()


def test_a_manifest_of_its_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: no such file; make it first"):
        SETS.read(tmp_path)
    (tmp_path / BUILDING).touch()
    with pytest.raises(UserError, match="encoding was not finished"):
        SETS.read(tmp_path)
    write_json(tmp_path / MANIFEST, SETS.sealed({"shape": [1, 2]}))
    assert SETS.read(tmp_path)["shape"] == [1, 2]
    assert SETS.read(tmp_path)["hash"] != SETS.sealed({"shape": [1, 3]})["hash"]
    for other in (Format("sets", 1, ""), Format("tests", 2, "")):
        with pytest.raises(UserError, match=f"must be {other.name}/{other.version}"):
            other.read(tmp_path)


def test_an_index_is_the_one_of_its_manifest(tmp_path: Path) -> None:
    path, items = tmp_path / "items.jsonl", [Item("a", ("x", "y")), Item("b")]
    digest = write_index(path, items)
    assert read_index(path, Item, digest) == read_index(path, Item, sha256_file(path)) == items
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(UserError, match="does not belong to the manifest"):
        read_index(path, Item, digest)
    path.write_text('{"id": "a", "tags": [], "more": 1}\n')
    with pytest.raises(UserError, match=r"items\.jsonl:1: fields differ from the format \(more\)"):
        read_index(path, Item, sha256_file(path))
    path.write_text('{"id": 3, "tags": []}\n')
    with pytest.raises(UserError, match=r"items\.jsonl:1: Expected `str`, got `int`"):
        read_index(path, Item, sha256_file(path))
    path.write_text("")
    with pytest.raises(UserError, match="does not belong"):
        read_index(path, Item, sha256_file(path))


def test_short_and_long_names_of_types() -> None:
    assert (
        dtype_of("bf16") is dtype_of("bfloat16") is torch.bfloat16
        and dtype_name(torch.bfloat16) == "bfloat16"
    )
    with pytest.raises(UserError, match="store 'half' is unknown; use one of fp32, bf16, fp16"):
        dtype_of("half", "store")
