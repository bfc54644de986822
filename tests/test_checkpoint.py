"""Checkpoints: self-describing, atomic under a kill at any moment, verified before use."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from scd_sf import checkpoint
from scd_sf.checkpoint import Checkpoints, find, provenance, read_provenance, verify
from scd_sf.files import sha256_file
from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)}


def save(store: Checkpoints, step: int, **more: object) -> Path:
    extra = {"updates": step, **more}
    record = provenance(stage="test", step=step, seed=7, data_hash="abc", extra=extra)

    def state(path: Path) -> None:
        (path / "engine").mkdir()
        (path / "engine" / "moments.bin").write_bytes(bytes([step % 256]) * 100)

    files = {"model": tensors(step), "ema": tensors(step + 1)}
    return store.write(step, files, f"step: {step}\n", record, training_state=state)


def test_write_then_read(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    path = save(store, 5)
    assert store.newest() == path == find(tmp_path)
    names = {p.name for p in path.iterdir()}
    assert names == {
        "model.safetensors",
        "ema.safetensors",
        "config.yaml",
        "provenance.json",
        "manifest.json",
        "state",
    }
    loaded = read_tensors(path / "model.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in tensors(5).items())
    record = read_provenance(path)
    assert (record["stage"], record["step"], record["seed"], record["updates"]) == ("test", 5, 7, 5)
    assert (store.root / "latest").read_text().strip() == path.name
    assert not list(store.root.glob("*.tmp"))


def test_tied_tensors_are_saved_twice(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    path = Checkpoints(tmp_path).write(1, {"model": {"a": base, "b": base, "c": base[:2]}}, "", {})
    loaded = read_tensors(path / "model.safetensors")
    assert (
        torch.equal(loaded["a"], base)
        and torch.equal(loaded["b"], base)
        and torch.equal(loaded["c"], base[:2])
    )


FILES = [
    "model.safetensors",
    "ema.safetensors",
    "config.yaml",
    "provenance.json",
    "manifest.json",
    "state/engine/moments.bin",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["delete", "truncate", "alter"])
def test_damage_is_named_and_the_step_skipped(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Checkpoints(tmp_path)
    good, bad = save(store, 1), save(store, 2)
    file = bad / name
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError) as caught:
        verify(bad)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert store.newest() == good
    assert str(file) in caplog.text
    save(store, 2)
    assert store.newest() == bad


def test_unlisted_file_is_refused(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1)
    (path / "state" / "extra.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match=r"extra\.pkl: not in the manifest"):
        verify(path)


def test_manifest_may_not_point_outside(tmp_path: Path) -> None:
    from scd_sf.checkpoint import _digest_of

    path = save(Checkpoints(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("self")
    manifest["files"]["../latest"] = {"size": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps({**manifest, "self": _digest_of(manifest)}))
    with pytest.raises(UserError, match="outside the checkpoint"):
        verify(path)


def test_nothing_saved_is_none_unless_required(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "nothing")
    assert store.newest() is None
    with pytest.raises(UserError, match="resume was asked for but there is no checkpoint"):
        store.newest(required=True)
    with pytest.raises(UserError, match="no checkpoint here"):
        find(tmp_path)
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="a Wan directory becomes a student by 'scd transplant'"):
        find(tmp_path / "wan")
    for name in ("stage2", "stage3"):
        (tmp_path / "demo" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        UserError, match="no checkpoint here; give one of the runs in it: stage2, stage3"
    ):
        find(tmp_path / "demo")
    with pytest.raises(UserError, match="absent: no such folder, so no checkpoint; give"):
        find(tmp_path / "absent")


def test_all_damaged_never_restarts_from_zero(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    (save(store, 1) / "config.yaml").unlink()
    with pytest.raises(UserError, match="none of its 1 steps is intact"):
        store.newest()


def test_missing_latest_is_said_and_the_verified_step_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Checkpoints(tmp_path)
    path = save(store, 3)
    (tmp_path / "latest").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest() == path
    assert "'latest' is missing" in caplog.text


def test_a_saved_step_is_never_overwritten(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    path = save(store, 3)
    with pytest.raises(UserError, match="already saved"):
        save(store, 3)
    verify(path)


def test_provenance_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    """NaN is no JSON: the checkpoint would be refused by every reader."""
    store = Checkpoints(tmp_path)
    for fault in ({"range": [0.0, math.nan]}, {"name": "\ud800"}):
        with pytest.raises(UserError, match=r"provenance\.json: not JSON .* could not be read"):
            save(store, 3, **fault)
    assert store.newest() is None
    verify(save(store, 3, range=[0.0, 1.0], name="grün"))


def test_prune_keeps_the_newest_intact(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    paths = {step: save(store, step) for step in (1, 2, 3, 4)}
    (paths[4] / "model.safetensors").unlink()
    assert store.prune(2) == [1]
    assert store.steps() == [2, 3, 4] and store.newest() == paths[3]
    with pytest.raises(UserError):
        store.prune(0)


def test_unwritable_root_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"step 1 is not saved.*check the disk"):
        save(Checkpoints(tmp_path / "file" / "checkpoints"), 1)


def test_not_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04evil")
    with pytest.raises(UserError, match="unreadable safetensors"):
        read_tensors(tmp_path / "model.safetensors")


def _die_at_event(root: Path, step: int, event: int) -> int:
    """Save in a forked child that exits without clean-up before its ``event``-th file operation;
    its exit code."""
    pid = os.fork()
    if pid == 0:
        left = [event]

        def hook(name: str, args: tuple[object, ...]) -> None:
            if name in (
                "open",
                "os.rename",
                "os.mkdir",
                "os.remove",
                "os.rmdir",
                "os.listdir",
                "os.scandir",
            ):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(hook)
        save(Checkpoints(root), step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """Every file operation of a save is a place to die. One directory is used throughout, so debris
    accumulates."""
    store = Checkpoints(tmp_path)
    previous = save(store, 1)
    step, event = 2, 1
    while True:
        code = _die_at_event(tmp_path, step, event)
        newest = store.newest()
        assert newest is not None
        assert newest in (previous, store.path(step))
        expected = 1 if newest == previous and step == 2 else int(newest.name.removeprefix("step_"))
        assert torch.equal(read_tensors(newest / "model.safetensors")["w"], tensors(expected)["w"])
        if newest == store.path(step):
            previous, step = newest, step + 1
        if code == 0:
            break
        event += 1
    assert event > 20
    save(store, step + 1)
    assert not list(tmp_path.glob("*.tmp"))


def test_has_is_true_only_for_an_intact_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Checkpoints(tmp_path)
    path = save(store, 1)
    assert store.has(1) and not store.has(2)
    (path / "config.yaml").write_text("other")
    assert not store.has(1) and "config.yaml" in caplog.text


def test_a_file_is_hashed_once_and_only_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading weights verifies configuration, provenance and these weights; the optimizer's state
    is left alone."""
    hashed: list[str] = []

    def noted(file: Path) -> str:
        hashed.append(file.name)
        return sha256_file(file)

    monkeypatch.setattr(checkpoint, "sha256_file", noted)
    path = save(Checkpoints(tmp_path), 1)
    hashed.clear()
    assert find(tmp_path, "ema") == find(path, "ema") == path
    assert sorted(hashed) == ["config.yaml", "ema.safetensors", "provenance.json"]
    verify(path)
    assert sorted(hashed) == [
        "config.yaml",
        "ema.safetensors",
        "model.safetensors",
        "moments.bin",
        "provenance.json",
    ]
    verify(path)
    assert len(hashed) == 5
    (path / "state" / "engine" / "moments.bin").write_bytes(b"x" * 100)
    assert find(path, "ema") == path, "what is not read may be damaged"
    with pytest.raises(UserError, match="sha256 differs"):
        verify(path)
    (path / "state" / "engine" / "moments.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="1 bytes, but the manifest says 100"):
        find(path, "ema")


def test_a_step_whose_weights_are_damaged_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(Checkpoints(tmp_path), 1), save(Checkpoints(tmp_path), 2)
    damaged = bytearray((newer / "ema.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newer / "ema.safetensors").write_bytes(damaged)
    assert find(tmp_path, "ema") == older and "skipping checkpoint" in caplog.text
    assert find(tmp_path, "model") == newer
    with pytest.raises(UserError, match=r"no weights 'best' .*; use model or ema$"):
        find(newer, "best")
    with pytest.raises(UserError, match="none of its 2 steps is intact and has weights 'best'"):
        find(tmp_path, "best")


def test_only_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    """Folders of others, and links, that merely look like unfinished steps are left alone."""
    store = Checkpoints(tmp_path / "run")
    (store.root / "step_00000001.tmp" / "state").mkdir(parents=True)
    (store.root / "step_of_mine.tmp").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (store.root / "step_00000007.tmp").symlink_to(tmp_path / "elsewhere")
    save(store, 2)
    assert sorted(p.name for p in store.root.glob("*.tmp")) == [
        "step_00000007.tmp",
        "step_of_mine.tmp",
    ]
    assert (tmp_path / "elsewhere").is_dir()


def test_links_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path / "run"), 1)
    (tmp_path / "elsewhere").write_bytes((path / "ema.safetensors").read_bytes())
    (path / "ema.safetensors").unlink()
    (path / "ema.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"ema\.safetensors: not a file of the checkpoint but a link"
    ):
        verify(path)
