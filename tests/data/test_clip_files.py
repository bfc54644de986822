"""One file per clip: atomic writing, checked headers, the index, and LatentClips and Prefetch over
them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from scd_sf.data.clip_files import (
    About,
    ClipFile,
    clip_path,
    clip_paths,
    read_header,
    sweep_clips,
    write_clip,
)
from scd_sf.data.clip_index import Common, fault_of, open_job
from scd_sf.data.latents import LatentClips
from scd_sf.data.prefetch import Prefetch
from scd_sf.data.prompts import PromptSet, index_clips, write_fixed_prompts
from scd_sf.files import is_part, part_of, read_jsonl
from scd_sf.types import UserError, VideoShape

SHAPE, WIDTH, LENGTH, CLIPS = VideoShape(3, 2, 4, 4), 8, 6, 5
COMMON = Common(SHAPE, "bfloat16", WIDTH, LENGTH, {"made": "by a test"})


def clip(number: int) -> tuple[torch.Tensor, torch.Tensor, About]:
    rng = torch.Generator().manual_seed(number)
    latents = torch.randn(SHAPE.latent(1)[1:], generator=rng).bfloat16()
    text = torch.randn(1 + number, WIDTH, generator=rng).bfloat16()
    return (
        latents,
        text,
        About(f"{number:02x}".ljust(32, "a"), f"prompt {number} é", seed=number, uuid=f"u{number}"),
    )


def build(root: Path) -> Path:
    open_job(root, COMMON)
    for number in range(CLIPS):
        write_clip(root, *clip(number))
    write_fixed_prompts(
        root,
        lambda texts: [torch.full((2, WIDTH), float(len(t))) for t in texts],
        "bad",
        torch.bfloat16,
    )
    assert index_clips(root) == CLIPS
    return root


def test_the_same_class_reads_the_folder(tmp_path: Path) -> None:
    clips = LatentClips(build(tmp_path), expected=SHAPE)
    assert len(clips) == CLIPS and clips.texts([3]) == ["prompt 3 é"]
    order = [4, 1, 1]
    batch, stored = clips.batch(order), clips.stored(order)
    assert batch.latents_BFCHW.dtype == torch.float32 and batch.text.text_BLE.shape == (
        3,
        LENGTH,
        WIDTH,
    )
    for row, states, number in zip(batch.latents_BFCHW, batch.text.text_BLE, order, strict=True):
        latents, text, _ = clip(number)
        assert torch.equal(row, latents.float()) and torch.equal(states[: 1 + number], text.float())
        assert states[1 + number :].eq(0).all()
    assert stored.latents_BFCHW.dtype == torch.bfloat16 and stored.text.text_BLE.shape == (
        3,
        5,
        WIDTH,
    )
    moved = stored.to("cpu")
    assert torch.equal(moved.latents_BFCHW, batch.latents_BFCHW)
    assert torch.equal(moved.text.text_BLE, batch.text.text_BLE)
    assert (
        clips.null.text_BLE.shape == (1, LENGTH, WIDTH)
        and clips.prompts.negative.text_BLE[0, 0, 0] == 3
    )
    assert torch.equal(
        PromptSet(tmp_path).conditioning([2]).text_BLE, clips.batch([2]).text.text_BLE
    )
    clips.verify()
    with pytest.raises(UserError, match="clips without held_out_prompt"):
        clips.batch([0], held_out=True)


def test_files_are_safetensors_and_their_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    path = clip_path(build(tmp_path), clip(2)[2].id)
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("latents"), clip(2)[0]) and torch.equal(
            file.get_tensor("text"), clip(2)[1]
        )
        assert json.loads(file.metadata()["clip"])["uuid"] == "u2"
    fixed = torch.arange(96.0).view(SHAPE.latent(1)[1:]).bfloat16(), torch.ones(2, WIDTH).bfloat16()
    write_clip(tmp_path, *fixed, About("f" * 32, "prompt", uuid="u", tags={"b": "1", "a": "2"}))
    digest = hashlib.sha256(clip_path(tmp_path, "f" * 32).read_bytes()).hexdigest()
    # as another process wrote it
    assert digest == "bcdcd55be58489f407597f26e57b95ebf2ed5670ffb08b917495e541ef06f71d"


def test_writing_refuses_nan_and_leaves_nothing(tmp_path: Path) -> None:
    latents, text, about = clip(0)
    with pytest.raises(UserError, match="latents are not finite"):
        write_clip(tmp_path, latents * float("nan"), text, about)
    assert not list(tmp_path.rglob("*.*"))


def test_only_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    path = clip_path(build(tmp_path), clip(0)[2].id)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = part_of(path)
    theirs = path.with_name(mine.name.replace(str(os.getpid()), str(dead.pid)))
    elsewhere = path.with_name(f".part-another.host-{dead.pid}-{'0' * 8}")
    for file in (mine, theirs, elsewhere):
        file.write_bytes(b"half")
        assert is_part(file)
    sweep_clips(tmp_path)
    assert mine.is_file() and elsewhere.is_file() and not theirs.is_file()
    assert index_clips(tmp_path) == CLIPS  # and they are no clips


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def _other_offsets(path: Path) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["latents"]["data_offsets"] = header["text"]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _deep(path: Path) -> None:
    text = b"[" * 10_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def _other_dtype(path: Path) -> None:
    write_clip(path.parents[1], clip(1)[0].float(), clip(1)[1], clip(1)[2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "bytes instead of"),
        (_long_header, "cut or not safetensors"),
        (_other_offsets, "header is not a clip's"),
        (_deep, "header is not a clip's"),
        (_foreign, "header is not a clip's"),
        (_other_dtype, r"latents .* torch.float32 instead of"),
        (lambda path: path.write_bytes(b""), "0 bytes, cut or not safetensors"),
        (
            lambda path: path.write_bytes(
                save({"latents": clip(1)[0], "text": clip(1)[1]}, {"clip": "[]"})
            ),
            "not an object",
        ),
        (
            lambda path: path.write_bytes(
                save({"latents": clip(1)[0], "text": clip(1)[1]}, {"clip": "{}"})
            ),
            "is not scd-sf",
        ),
        (
            lambda path: path.write_bytes(clip_path(path.parents[1], clip(2)[2].id).read_bytes()),
            "says it is clip 02",
        ),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = clip_path(build(tmp_path), clip(1)[2].id)
    damage(path)
    assert str(path) in fault_of(path, COMMON)
    with pytest.raises(UserError, match=message):
        index_clips(tmp_path)
    with pytest.raises(UserError, match=path.name):
        LatentClips(tmp_path).stored([0, 1])
    LatentClips(tmp_path).stored([0, 2])


def test_changed_bits_missing_files_and_another_index_are_named(tmp_path: Path) -> None:
    path = clip_path(build(tmp_path), clip(1)[2].id)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert not fault_of(path, COMMON) and "sha256 differs" in fault_of(path, COMMON, full=True)
    with pytest.raises(UserError, match="contents changed"):
        LatentClips(tmp_path).verify()
    path.unlink()
    with pytest.raises(UserError, match=r"listed in .*clips.jsonl but missing"):
        LatentClips(tmp_path)
    rows = read_jsonl(tmp_path / "clips.jsonl", "")
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(UserError, match="does not belong to the manifest"):
        LatentClips(tmp_path)


def test_a_folder_of_other_settings_or_of_somebody_is_left_alone(tmp_path: Path) -> None:
    open_job(build(tmp_path / "a"), COMMON)
    with pytest.raises(UserError, match=r"made with other settings \(made\)"):
        open_job(tmp_path / "a", Common(SHAPE, "bfloat16", WIDTH, LENGTH, {"made": "otherwise"}))
    with pytest.raises(UserError, match=r"made with other settings \(width\)"):
        open_job(tmp_path / "a", Common(SHAPE, "bfloat16", WIDTH + 1, LENGTH, COMMON.settings))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds files but no job.json"):
        open_job(tmp_path / "b", COMMON)


def test_headers_longer_than_the_first_read(tmp_path: Path) -> None:
    latents, text, _ = clip(0)
    write_clip(tmp_path, latents, text, About("0" * 32, "word " * 20_000))
    with ClipFile(clip_paths(tmp_path)[0]) as file:
        assert (
            torch.equal(file.tensor("latents"), latents)
            and len(file.header.about.prompt) == 100_000
        )
    assert read_header(clip_paths(tmp_path)[0]).about.id == "0" * 32


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_reading_ahead_changes_nothing_but_when(tmp_path: Path, depth: int) -> None:
    clips = LatentClips(build(tmp_path))
    order = [[0, 1], [2, 3], [4, 0], [1, 2], [0, 1], [3, 4]]
    reads = Prefetch(clips.stored, depth)
    for number, indices in enumerate(order):
        reads.expect(order[number : number + 3])
        assert len(reads._futures) <= depth
        assert torch.equal(reads.batch(indices).latents_BFCHW, clips.stored(indices).latents_BFCHW)
    reads.expect([[4, 4], [3, 3]])
    reads.expect([[2, 2]])  # as after going back to a checkpoint
    # nobody expected it
    assert torch.equal(reads.batch([1, 1]).latents_BFCHW, clips.stored([1, 1]).latents_BFCHW)
    assert torch.equal(reads.batch([2, 2]).latents_BFCHW, clips.stored([2, 2]).latents_BFCHW)
    clip_path(tmp_path, clip(3)[2].id).unlink()
    reads.expect([[0, 0], [3, 3]])
    reads.batch([0, 0])
    with pytest.raises(UserError, match="cannot be opened"):
        reads.batch([3, 3])
    reads.close()
