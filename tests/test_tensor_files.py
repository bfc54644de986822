"""Weights in files: what is refused before it is read, and that NaN, pointers and stale shards
never pass."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scd_sf.tensor_files import check_finite, open_tensor_folder, open_tensors, read_tensors
from scd_sf.types import UserError

STEM = "model"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2838276208\n"
)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin"])
def test_a_pointer_of_git_lfs_says_so(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_text(POINTER)
    with pytest.raises(
        UserError, match=rf"weights\{suffix}: a Git LFS pointer.*run `git lfs pull`"
    ):
        read_tensors(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(4, 4, dtype=dtype)
    bad[1, 2] = value
    tensors = {"fine": torch.ones(2), "blocks.0.ffn.0.weight": bad, "empty": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save({"generator": {**tensors, "column": bad.T}}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(
            UserError, match=rf"{name}: tensor '.*blocks\.0\.ffn\.0\.weight' holds NaN or infinity"
        ):
            read_tensors(tmp_path / name)
    assert check_finite(torch.arange(3), "whole numbers", "here").tolist() == [0, 1, 2]


def shards(
    folder: Path, first: dict[str, Tensor], second: dict[str, Tensor], places: dict[str, int]
) -> Path:
    """Two shards and an index that places tensors in them."""
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    folder.mkdir()
    save_file(first, folder / names[0])
    save_file(second, folder / names[1])
    table = {name: names[number] for name, number in places.items()}
    (folder / f"{STEM}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": table})
    )
    return folder


def test_the_index_decides_where_a_tensor_is_read(tmp_path: Path) -> None:
    """A stale copy in another shard is not read, whichever shard comes last."""
    one, other, zero = torch.ones(4), torch.ones(4), torch.zeros(4)
    for name, stale in (("first", 1), ("last", 0)):
        pair = [{"a": one}, {"a": one, "b": other}]
        pair[stale] = {**pair[stale], "a": zero}
        if stale == 0:
            pair[0] = {**pair[0], "c": other}
        places = {"a": 1 - stale, "b": 1} | ({"c": 0} if stale == 0 else {})
        folder = shards(tmp_path / name, pair[0], pair[1], places)
        assert torch.equal(open_tensor_folder(folder, STEM)["a"].read(), one)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            {"a": 0, "b": 0},
            "places tensor 'b' in model-00001-of-00002.safetensors, which does not have it",
        ),
        ({"a": 0}, None),
        ({"b": 1}, None),
        ({"a": 0, "b": 1, "c": 1}, "places tensor 'c'"),
    ],
)
def test_an_index_that_its_shards_contradict(
    tmp_path: Path, places: dict[str, int], words: str | None
) -> None:
    """A shard that the index does not name is not read; one that it names has nothing that the
    index does not know."""
    folder = shards(tmp_path / "x", {"a": torch.ones(1)}, {"b": torch.ones(1)}, places)
    if words is None:
        assert set(open_tensor_folder(folder, STEM)) == set(places)
        return
    with pytest.raises(UserError, match=words):
        open_tensor_folder(folder, STEM)


def test_shards_that_nobody_can_tell_apart(tmp_path: Path) -> None:
    folder = shards(
        tmp_path / "x",
        {"a": torch.ones(1), "more": torch.ones(1)},
        {"b": torch.ones(1)},
        {"a": 0, "b": 1},
    )
    with pytest.raises(
        UserError, match=r"has tensor 'more', which model\.safetensors\.index\.json"
    ):
        open_tensor_folder(folder, STEM)
    (folder / f"{STEM}.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json: missing beside 2 shards"):
        open_tensor_folder(folder, STEM)
    (folder / f"{STEM}.safetensors.index.json").write_text(POINTER)
    with pytest.raises(UserError, match=r"index\.json: a Git LFS pointer"):
        open_tensor_folder(folder, STEM)


def refused(file: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_tensors(file)
    assert (
        file.name in str(caught.value)
        and "\n" not in str(caught.value)
        and len(str(caught.value)) < 600
    )


def test_pickles_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1).expand(10**12)}, file)
    refused(file, "has more numbers than the file holds")
    torch.save({"a": torch.zeros(3, device="meta")}, file)
    refused(file, "'a' is meta")
    torch.save({"a": torch.eye(3).to_sparse()}, file)
    refused(file, "only plain tensors")
    torch.save({"a": torch.zeros(3, dtype=torch.complex64)}, file)
    refused(file, "only plain tensors")
    around: dict[str, object] = {"a": torch.zeros(1)}
    around["again"] = around
    torch.save(around, file)
    refused(file, "tables inside tables")
    torch.save({"a" * 5000: torch.zeros(1)}, file)
    refused(file, "has 5,000 characters")
    torch.save({"a": torch.zeros(1), "epoch": 3}, file)
    refused(file, "entry 'epoch' is not a tensor")
    torch.save({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)}, file)
    refused(file, "holds 'a.b' twice")
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for item in source.infolist():
            out.writestr(item.filename, source.read(item))
    refused(file, "claim .* bytes, more than the file has")


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\x80\x02.", pickle.dumps([1]), pickle.dumps({"a": 10**5000})]
)
def test_damaged_pickles(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.pth"):
        if open_tensors(file) == {}:
            raise UserError(f"{file}: holds no tensor")


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"__metadata__": {"a": 1}}',
        b"[" * 100_000,
    ],
)
def test_damaged_safetensors(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(file, "unreadable safetensors")
    file.write_bytes((2**63).to_bytes(8, "little") + header)
    refused(file, "unreadable safetensors")
    for other in (tmp_path / "none.safetensors", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="missing"):
            read_tensors(other)
