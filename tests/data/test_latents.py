"""Latent directories: lazy batches, resumable writing, data order, and what damaged or foreign data
says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scd_sf.data.latents import LatentClip, LatentClips, LatentWriter, epoch_order
from scd_sf.data.prompts import Prompt, PromptSet, encode_prompts, finish_prompts
from scd_sf.data.shards import ShardWriter
from scd_sf.files import LFS_POINTER, Json, read_json, write_json
from scd_sf.types import UserError, VideoShape

SHAPE = VideoShape(3, 2, 4, 4)
CLIPS = 5
PROMPTS = [Prompt("p0", "left"), Prompt("p1", "right"), Prompt("p2", "to the left", held_out=True)]


def fake(texts: Sequence[str]) -> list[Tensor]:
    return [torch.full((1 + len(text.split()), 4), float(len(text) + 1)) for text in texts]


def latents() -> Tensor:
    return (
        torch.randn(SHAPE.latent(CLIPS), generator=torch.Generator().manual_seed(0)).half().float()
    )


def rows() -> list[LatentClip]:
    return [
        LatentClip(f"c{i}", i % 2, 2 if i % 2 == 0 else None, {"place": "meadow"})
        for i in range(CLIPS)
    ]


def build(root: Path) -> Path:
    """Whatever of it is already there is kept."""
    writer = ShardWriter(root, {"source": "test"})
    text = encode_prompts(writer, PROMPTS, fake, max_length=6)
    out = LatentWriter(writer, SHAPE, per_shard=2)
    for part in latents()[out.done :].split(3):
        out.append(part)
    out.finish(rows(), text)
    return root


def test_batches_are_typed_and_exact(tmp_path: Path) -> None:
    clips = LatentClips(build(tmp_path), expected=SHAPE)
    assert (
        len(clips) == CLIPS
        and clips.shape == SHAPE
        and [row.id for row in clips.rows] == ["c0", "c1", "c2", "c3", "c4"]
    )
    batch = clips.batch([4, 1, 1])
    assert batch.latents_BFCHW.dtype == torch.float32
    assert torch.equal(batch.latents_BFCHW, latents()[[4, 1, 1]])
    assert torch.equal(batch.text.text_BLE, clips.prompts.conditioning([0, 1, 1]).text_BLE)
    assert torch.equal(clips.null.text_BLE, clips.prompts.null.text_BLE)
    assert batch.to("cpu").text.batch == 3
    clips.verify()


def test_held_out_prompts_only_when_asked(tmp_path: Path) -> None:
    clips = LatentClips(build(tmp_path))
    held = clips.batch([0, 2], held_out=True).text.text_BLE
    assert torch.equal(held, clips.prompts.conditioning([2, 2]).text_BLE)
    with pytest.raises(UserError, match="clips without held_out_prompt"):
        clips.batch([1], held_out=True)
    assert all(not clips.prompts.rows[row.prompt].held_out for row in clips.rows)
    assert len(PromptSet(tmp_path)) == 2


def test_writing_resumes_with_complete_shards(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"source": "test"})
    encode_prompts(writer, PROMPTS, fake, max_length=6)
    LatentWriter(writer, SHAPE, per_shard=2).append(latents()[:3])
    first = tmp_path / "latents-00000.safetensors"
    written = first.stat().st_mtime_ns
    assert LatentWriter(ShardWriter(tmp_path, {"source": "test"}), SHAPE, per_shard=2).done == 2
    build(tmp_path)
    assert first.stat().st_mtime_ns == written
    assert LatentClips(tmp_path).hash == LatentClips(build(tmp_path.with_name("whole"))).hash
    assert torch.equal(LatentClips(tmp_path).latents(range(CLIPS)), latents())
    assert not (tmp_path / "building.json").exists()


def test_writer_refuses_other_shapes_nan_and_missing_clips(tmp_path: Path) -> None:
    writer = LatentWriter(ShardWriter(tmp_path, {}), SHAPE)
    with pytest.raises(
        UserError, match=r"clip 0: latents \(5, 2, 2, 4, 4\) instead of \(5, 3, 2, 4, 4\)"
    ):
        writer.append(latents()[:, :2])
    with pytest.raises(UserError, match="latents of clip 0 and on: not finite"):
        writer.append(latents() * float("nan"))
    writer.append(latents()[:1])
    with pytest.raises(UserError, match="1 latents for 5 clips"):
        writer.finish(rows(), {})


def test_other_shape_than_the_model_is_named(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(
        UserError, match=r"latents have frames 3, the configuration asks for 21; set it to 3"
    ):
        LatentClips(tmp_path, expected=replace(SHAPE, frames=21))
    with pytest.raises(UserError, match="latents have spatial 8, the configuration asks for 16"):
        LatentClips(tmp_path, expected=replace(SHAPE, spatial=16))


@pytest.mark.parametrize("damage", ["missing", "cut", "pointer"])
def test_damaged_shards_are_named_when_opened(tmp_path: Path, damage: str) -> None:
    path = build(tmp_path) / "latents-00001.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(LFS_POINTER + b".github.com/spec/v1\noid sha256:0\nsize 9\n")
    remedy = "git lfs pull" if damage == "pointer" else "; copy it again, or delete"
    with pytest.raises(UserError, match=rf"latents-00001\.safetensors: .*{remedy}"):
        LatentClips(tmp_path)


def _with_size(root: Path, number: int) -> None:
    manifest = read_json(root / "manifest.json", "")
    shards = manifest["latents"]["shards"]  # type: ignore[index]
    shards[number]["bytes"] = (root / shards[number]["file"]).stat().st_size
    write_json(root / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"latents": torch.zeros(2, 2, 2, 4, 4)},
            r"latents \(2, 2, 2, 4, 4\) instead of \(2, 3, 2, 4, 4\)",
        ),
        ({"other": torch.zeros(200)}, "tensor 'latents' cannot be read"),
    ],
)
def test_foreign_shards_are_named_when_read(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, build(tmp_path) / "latents-00001.safetensors")
    _with_size(tmp_path, 1)
    clips = LatentClips(tmp_path)
    assert clips.batch([0, 1, 4]).text.batch == 3
    with pytest.raises(UserError, match=rf"latents-00001\.safetensors: {message}"):
        clips.batch([2])
    with pytest.raises(UserError, match="contents changed"):
        clips.verify()


def test_garbage_bytes_are_named(tmp_path: Path) -> None:
    path = build(tmp_path) / "latents-00000.safetensors"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(
        UserError, match=r"latents-00000\.safetensors: tensor 'latents' cannot be read"
    ):
        LatentClips(tmp_path).batch([0])


def _no_shape(manifest: Json) -> None:
    del manifest["latents"]["shape"]  # type: ignore[attr-defined]


def _no_shards(manifest: Json) -> None:
    manifest["latents"]["shards"] = []  # type: ignore[index]


def _version(manifest: Json) -> None:
    manifest["version"] = 99


def _negative(manifest: Json) -> None:
    manifest["latents"]["shards"][0]["count"] = -2  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_shape, "'latents.shape': Expected `object`, got `null`"),
        (_no_shards, "'shards'"),
        (_version, "'format'/'version' must be scd-sf-latents/1"),
        (_negative, "has -2 rows"),
    ],
)
def test_bad_manifests(tmp_path: Path, change: Callable[[Json], None], message: str) -> None:
    path = build(tmp_path) / "manifest.json"
    manifest = read_json(path, "")
    change(manifest)
    write_json(path, manifest)
    with pytest.raises(UserError) as caught:
        LatentClips(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "words"),
    [(4096, "do not fit into latents-00000"), (10**18, "it must be 1 .. 4,096")],
    ids=str,
)
def test_a_shape_that_the_files_cannot_hold_allocates_nothing(
    tmp_path: Path, size: int, words: str
) -> None:
    path = build(tmp_path) / "manifest.json"
    manifest = read_json(path, "")
    manifest["latents"]["shape"]["height"] = size  # type: ignore[index]
    write_json(path, manifest)
    with pytest.raises(UserError, match=rf"manifest\.json: .*{words}"):
        LatentClips(tmp_path)


def test_changed_rows_prompts_only_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"manifest\.json: no such file; make it with generate_clips.py"
    ):
        LatentClips(tmp_path / "none")
    writer = ShardWriter(tmp_path / "prompts", {})
    finish_prompts(writer, encode_prompts(writer, PROMPTS, fake, max_length=6))
    with pytest.raises(UserError, match="holds prompts but no latents"):
        LatentClips(tmp_path / "prompts")
    index = build(tmp_path / "clips") / "clips.jsonl"
    index.write_text(index.read_text().replace('"prompt": 0', '"prompt": 1', 1))
    with pytest.raises(UserError, match=r"clips\.jsonl: does not belong to the manifest"):
        LatentClips(tmp_path / "clips")


def test_epoch_order_is_a_pure_function_that_covers_every_epoch() -> None:
    batch, size = 4, 10
    steps = [epoch_order(7, step, batch, size) for step in range(15)]
    flat = [index for step in steps for index in step]
    epochs = [flat[first : first + size] for first in range(0, 60, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != list(range(size))
    assert steps[9] == epoch_order(7, 9, batch, size) and steps[9] != epoch_order(8, 9, batch, size)
    assert len(epoch_order(0, 3, 25, 10)) == 25
    with pytest.raises(UserError, match="size 0"):
        epoch_order(0, 0, 4, 0)
