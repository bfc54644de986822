"""scd data: check, repair, manifest, export and import; files in other projects' exact layouts, and
hostile ones."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import lmdb
import pyarrow
import pyarrow.parquet
import pytest
import tiny_run
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from scd_sf.cli import app
from scd_sf.data.clip_files import VIDEO, About, clip_path, clip_paths, write_clip
from scd_sf.data.clip_index import Common, open_job
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import index_clips, write_fixed_prompts
from scd_sf.data.sources.raw_files import Refused
from scd_sf.files import locked, part_of, read_jsonl, write_bytes
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.vae import load_vae
from scd_sf.tools.data import foreign
from scd_sf.tools.data.foreign import read_parquet
from scd_sf.types import UserError

SHAPE, WIDTH = tiny_run.SHAPE, tiny_run.WAN.text_dim
PROMPTS = ["left in meadow", "right in hall", "still in hall"]
VIDEO_BYTES = b"not really a video"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_wan(tmp_path_factory.mktemp("model"))


def latents(number: int) -> Tensor:
    return torch.randn(
        SHAPE.latent(1)[1:], generator=torch.Generator().manual_seed(number)
    ).bfloat16()


def states(number: int) -> Tensor:
    return (
        1
        + torch.rand(2 + number, WIDTH, generator=torch.Generator().manual_seed(number)).bfloat16()
    )


def folder(root: Path) -> Path:
    """Three clips of ours, with videos."""
    open_job(root, Common(SHAPE, "bfloat16", WIDTH, 512, {"videos": [16, 18]}))
    for number, prompt in enumerate(PROMPTS):
        about = About(
            f"{number:02x}".ljust(32, "b"),
            prompt,
            video_sha256=hashlib.sha256(VIDEO_BYTES).hexdigest(),
        )
        path = clip_path(root, about.id)
        path.parent.mkdir()
        write_bytes(path.with_suffix(VIDEO), VIDEO_BYTES)
        write_clip(root, latents(number), states(number), about)
    write_fixed_prompts(
        root, lambda texts: [torch.ones(1, WIDTH) for _ in texts], "bad", torch.bfloat16
    )
    index_clips(root)
    return root


def scd(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def imported(source: Path, out: Path, model: Path) -> Result:
    return scd(
        "import", source, out, "--model", model, "--negative-prompt", "still", "--text-cache", "off"
    )


def refused(out: Path) -> list[str]:
    return [str(row["reason"]) for row in read_jsonl(out / "quarantine" / "refused.jsonl", "")]


# -------------------------------------------------------------------------- check, repair, manifest


def test_a_whole_folder_passes_and_every_damage_is_found_and_repaired(tmp_path: Path) -> None:
    root = folder(tmp_path / "clips")
    assert (
        scd("check", root, "--full").exit_code == 0 and "3 clips whole" in scd("check", root).stdout
    )
    one, two, three = clip_paths(root)
    one.write_bytes(one.read_bytes()[:-2])
    two.with_suffix(VIDEO).unlink()
    data = bytearray(three.read_bytes())
    data[-1] ^= 1
    three.write_bytes(bytes(data))
    old = part_of(three)
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    quick, full = scd("check", root), scd("check", root, "--full")
    assert (
        quick.exit_code == 1
        and "1 clip whole" in quick.stdout
        and "1 temporary file" in quick.stdout
    )
    assert (
        "cut?" in quick.stdout
        and "missing beside its latents" in quick.stdout
        and "2 listed but not whole" in quick.stdout
    )
    assert "0 clips whole" in full.stdout and "contents changed" in full.stdout
    done = scd("repair", root)
    assert done.exit_code == 0 and "1 clips in the index" in done.stdout and not old.exists()
    assert sorted(file.name for file in (root / "quarantine").iterdir()) == sorted(
        [one.name, one.with_suffix(VIDEO).name, two.name]
    )
    assert len(LatentClips(root)) == 1 and scd("check", root).exit_code == 0
    assert "1 files moved, 0 clips" in scd("repair", root, "--full").stdout


def test_the_states_beside_the_clips_are_checked_too(tmp_path: Path) -> None:
    """Those of the empty and of the negative prompt, which training refuses when they are
    damaged."""
    root = folder(tmp_path / "clips")
    for name in ("null.safetensors", "negative.safetensors"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole + b"xx")
        result = scd("check", root)
        assert result.exit_code == 1 and name in result.stdout
        (root / name).write_bytes(whole)
    assert scd("check", root).exit_code == 0


def test_the_manifest_is_made_again_from_the_files(tmp_path: Path) -> None:
    root = folder(tmp_path / "clips")
    before = {name: (root / name).read_bytes() for name in ("manifest.json", "clips.jsonl")}
    for name in before:
        (root / name).unlink()
    assert scd("check", root).exit_code == 1
    assert scd("manifest", root).exit_code == 0
    assert {name: (root / name).read_bytes() for name in before} == before


def test_shard_directories_are_checked_but_not_repaired(tmp_path: Path) -> None:
    root = tiny_run.write_latents(tmp_path / "shards", 4)
    said = scd("check", root, "--full")
    assert said.exit_code == 0 and "4 clips whole" in said.stdout and " 0 GB" not in said.stdout
    assert isinstance(scd("repair", root).exception, UserError)


# ------------------------------------------------------------------------------------------- export


def test_tars_are_deterministic_go_on_and_come_back_bit_for_bit(
    tmp_path: Path, model: Path
) -> None:
    root, out = folder(tmp_path / "clips"), tmp_path / "tars"
    assert "2 tars" in scd("export-webdataset", root, out, "--per-tar", 2).stdout
    with tarfile.open(out / "shard-00000.tar") as tar:
        stem = clip_paths(root)[0].stem
        assert tar.getnames()[:3] == [f"{stem}.safetensors", f"{stem}.prompt.txt", f"{stem}.mp4"]
        assert all((entry.mtime, entry.uid, entry.mode & 0o7000) == (0, 0, 0) for entry in tar)
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    kept = (out / "shard-00001.tar").stat().st_mtime_ns
    (out / "shard-00000.tar").write_bytes(first["shard-00000.tar"][:700])
    scd("export-webdataset", root, out, "--per-tar", 2)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first
    assert (out / "shard-00001.tar").stat().st_mtime_ns == kept
    again = tmp_path / "again"
    assert imported(out, again, model).exit_code == 0
    for path in clip_paths(root):
        copy = clip_path(again, path.stem)
        assert copy.read_bytes() == path.read_bytes()
        assert copy.with_suffix(VIDEO).read_bytes() == path.with_suffix(VIDEO).read_bytes()
    assert scd("check", again, "--full").exit_code == 0


# ------------------------------------------------------------------------------------------- import


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rcm(number: int) -> dict[str, bytes]:
    """A sample as rCM writes it: latents (C, F, H, W), text states padded with zeros."""
    padded = torch.zeros(1, 12, WIDTH, dtype=torch.bfloat16)
    padded[0, : 2 + number] = states(number)
    name = f"{number:09d}"
    return {
        f"{name}.latent.pt": saved(latents(number).transpose(0, 1).contiguous()),
        f"{name}.embed.pt": saved(padded),
        f"{name}.prompt.txt": PROMPTS[number].encode(),
    }


def tar_of(path: Path, members: dict[str, bytes], extra: Sequence[tarfile.TarInfo] = ()) -> Path:
    with tarfile.open(path, "w") as tar:
        for entry in extra:
            tar.addfile(entry)
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def by_prompt(root: Path) -> tuple[Tensor, Tensor]:
    """Latents and text states of all clips, in the order of PROMPTS."""
    clips = LatentClips(root)
    batch = clips.batch(
        sorted(range(len(clips)), key=lambda index: PROMPTS.index(clips.texts([index])[0]))
    )
    return batch.latents_BFCHW, batch.text.text_BLE


def test_rcm_tars(tmp_path: Path, model: Path) -> None:
    tar_of(tmp_path / "00000.tar", rcm(0) | rcm(1))
    tar_of(tmp_path / "00001.tar", rcm(2))
    result = imported(tmp_path, tmp_path / "out", model)
    assert result.exit_code == 0 and "3 clips" in result.stdout
    found, text = by_prompt(tmp_path / "out")
    for number in range(3):
        assert torch.equal(found[number], latents(number).float())
        assert (
            torch.equal(text[number, : 2 + number], states(number).float())
            and not text[number, 2 + number :].any()
        )
    names = {path.name for path in clip_paths(tmp_path / "out")}
    assert imported(tmp_path, tmp_path / "out", model).exit_code == 0
    assert {path.name for path in clip_paths(tmp_path / "out")} == names


class Runs:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_hostile_tars_are_read_past_and_listed(tmp_path: Path, model: Path) -> None:
    source, marker = tmp_path / "in", tmp_path / "marker"
    source.mkdir()
    link = tarfile.TarInfo("000000007.latent.pt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("000000008.latent.pt")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../secret"
    bad = {f"/abs/{name}": data for name, data in rcm(1).items()}
    bad |= {f"../{name}": data for name, data in rcm(1).items()}
    bad |= {
        "000000003.latent.pt": saved(Runs(marker)),
        "000000003.embed.pt": rcm(1)["000000001.embed.pt"],
    }
    bad |= {
        "000000003.prompt.txt": b"x",
        "000000004.sh": b"rm",
        "000000005.latent.pt": b"\x80\x04cos\nmkdir\n.",
    }
    bad |= {"000000005.embed.pt": saved({"a": torch.ones(1)}), "000000005.prompt.txt": b"y"}
    huge = torch.zeros(1).expand(16, 10_000, 10_000, 10)
    bad |= {
        "000000006.latent.pt": saved(huge),
        "000000006.embed.pt": saved(torch.ones(1, 8)),
        "000000006.prompt.txt": b"",
    }
    tar_of(source / "0.tar", rcm(0) | bad | rcm(2), [link, hard])
    whole = tar_of(
        source / "1.tar", {name.replace("0001.", "0009."): data for name, data in rcm(1).items()}
    )
    whole.write_bytes(whole.read_bytes()[:2000])  # a torn tail
    result = imported(source, tmp_path / "out", model)
    assert isinstance(result.exception, UserError) and "were refused" in str(result.exception)
    assert not marker.exists() and not (tmp_path / "secret").exists()
    assert sorted(LatentClips(tmp_path / "out").texts([0, 1])) == [PROMPTS[0], PROMPTS[2]]
    reasons = "\n".join(refused(tmp_path / "out"))
    for said in (
        "leaves the archive",
        "not a regular file",
        "could run code",
        "its suffix is none of",
        "more than",
        "cut",
    ):
        assert said in reasons, said
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_tars_of_ours_that_were_changed_are_refused(tmp_path: Path, model: Path) -> None:
    root, source = folder(tmp_path / "clips"), tmp_path / "in"
    source.mkdir()
    one, two, three = clip_paths(root)
    data = bytearray(two.read_bytes())
    data[-1] ^= 1
    members = {
        one.name: one.read_bytes(),
        f"{one.stem}.prompt.txt": b"",
        one.with_suffix(VIDEO).name: b"other",
    }
    members |= {
        two.name: bytes(data),
        f"{two.stem}.prompt.txt": b"",
        "x.safetensors": three.read_bytes(),
    }
    members |= {
        "x.prompt.txt": b"",
        three.name: three.read_bytes(),
        f"{three.stem}.prompt.txt": b"",
    }
    tar_of(source / "0.tar", members)
    assert isinstance(imported(source, tmp_path / "out", model).exception, UserError)
    assert [path.name for path in clip_paths(tmp_path / "out")] == [three.name]
    reasons = "\n".join(refused(tmp_path / "out"))
    assert (
        "mp4 is not the one" in reasons
        and "contents changed" in reasons
        and "not a clip's id" in reasons
    )


def write_lmdb(path: Path, values: Tensor, prompts: Sequence[str]) -> None:
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as put:
        put.put(b"latents_shape", " ".join(map(str, values.shape)).encode())
        for number, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
            put.put(f"latents_{number}_data".encode(), value.half().numpy().tobytes())
            put.put(f"prompts_{number}_data".encode(), prompt.encode())


def test_self_forcing_lmdb(tmp_path: Path, model: Path) -> None:
    values = torch.stack([latents(number).half() for number in range(3)])
    path = torch.stack([torch.zeros_like(values), values], dim=1)  # K = 2 steps, the clean one last
    (tmp_path / "in").mkdir()
    write_lmdb(tmp_path / "in" / "shard_0", path[:2], PROMPTS[:2])
    write_lmdb(tmp_path / "in" / "shard_1", values[2:], PROMPTS[2:])
    result = imported(tmp_path / "in", tmp_path / "out", model)
    assert result.exit_code == 0, result.output
    found, text = by_prompt(tmp_path / "out")
    assert torch.equal(found, values.bfloat16().float())
    encoder = load_text_encoder(model)
    assert torch.equal(text, encoder.encode(PROMPTS).text_BLE.bfloat16().float())
    write_lmdb(tmp_path / "bad", values, PROMPTS)
    with lmdb.open(str(tmp_path / "bad"), map_size=2**24) as env, env.begin(write=True) as put:
        put.put(b"latents_1_data", b"short")
        put.delete(b"prompts_2_data")
    assert isinstance(imported(tmp_path / "bad", tmp_path / "bad-out", model).exception, UserError)
    assert refused(tmp_path / "bad-out") == [
        "5 bytes for shape (3, 4, 4, 4) of float16",
        "has no latents or no prompt",
    ]
    with lmdb.open(str(tmp_path / "bad"), map_size=2**24) as env, env.begin(write=True) as put:
        put.put(b"latents_shape", b"__import__('os') 1 1 1 1")
    assert "latents_shape" in str(
        imported(tmp_path / "bad", tmp_path / "bad-out2", model).exception
    )


def parquet_rows() -> dict[str, list[object]]:
    raw = [latents(number).float().transpose(0, 1).contiguous() for number in range(3)]
    text = [torch.cat([states(number).float(), torch.zeros(4, WIDTH)]) for number in range(3)]
    return {
        "id": [f"v{number}" for number in range(3)],
        "caption": list(PROMPTS),
        "vae_latent_bytes": [value.numpy().tobytes() for value in raw],
        "vae_latent_shape": [list(value.shape) for value in raw],
        "vae_latent_dtype": ["float32"] * 3,
        "text_embedding_bytes": [value.numpy().tobytes() for value in text],
        "text_embedding_shape": [list(value.shape) for value in text],
        "text_embedding_dtype": ["float32"] * 3,
        "num_frames": [9] * 3,
    }


def write_parquet(rows: dict[str, list[object]], path: Path, **options: object) -> None:
    pyarrow.parquet.write_table(pyarrow.table(rows), path, **options)


def test_row_groups_of_parquet_have_a_budget(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any is read, by what the footer says of each; compression does not hide it."""
    rows = parquet_rows()
    rows["text_embedding_bytes"][2] = bytes(100_000)
    write_parquet(rows, tmp_path / "a.parquet", row_group_size=1)
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    monkeypatch.setattr(foreign, "ROW_GROUP", 50_000)
    said = str(imported(tmp_path / "a.parquet", tmp_path / "out", model).exception)
    assert (
        "a.parquet: row group 2 takes" in said
        and "smaller row groups" in said
        and not (tmp_path / "out").exists()
    )


def test_fastvideo_parquet_is_normalised_by_the_models_vae(tmp_path: Path, model: Path) -> None:
    rows = parquet_rows()
    write_parquet(rows, tmp_path / "a.parquet")
    assert imported(tmp_path / "a.parquet", tmp_path / "out", model).exit_code == 0
    found, text = by_prompt(tmp_path / "out")
    raw = torch.stack([latents(number).float() for number in range(3)])
    wanted = load_vae(model).normalised(raw.transpose(1, 2)).transpose(1, 2).bfloat16().float()
    assert torch.equal(found, wanted) and torch.equal(text[1, :3], states(1).float())
    rows["vae_latent_shape"][1] = [4, 3, 4, 2**40]
    write_parquet(rows, tmp_path / "b.parquet")
    assert isinstance(
        imported(tmp_path / "b.parquet", tmp_path / "out-b", model).exception, UserError
    )
    assert (
        len(LatentClips(tmp_path / "out-b")) == 2
        and "bytes for shape" in refused(tmp_path / "out-b")[0]
    )
    rows["clip_feature_bytes"] = [b""] * 3
    write_parquet(rows, tmp_path / "c.parquet")
    said = str(imported(tmp_path / "c.parquet", tmp_path / "out-c", model).exception)
    assert (
        "column 'clip_feature_bytes' that is not known" in said
        and not (tmp_path / "out-c").exists()
    )


def test_sources_and_models_that_do_not_fit_are_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    good = tar_of(tmp_path / "good.tar", rcm(0))
    assert "nothing is overwritten" in str(imported(good, tmp_path / "taken", model).exception)
    assert "holds none of" in str(imported(tmp_path / "empty", tmp_path / "out", model).exception)
    assert "no such file" in str(imported(tmp_path / "absent", tmp_path / "out", model).exception)
    (tmp_path / "junk.tar").write_bytes(b"x" * 2000)
    assert "no clip in it could be taken" in str(
        imported(tmp_path / "junk.tar", tmp_path / "out", model).exception
    )
    wide = {
        name: saved(torch.ones(5, 3, 4, 4)) if "latent" in name else data
        for name, data in rcm(0).items()
    }
    said = str(imported(tar_of(tmp_path / "wide.tar", wide), tmp_path / "out", model).exception)
    assert "the model's VAE has C = 4" in said and not (tmp_path / "out").exists()


# -------------------------------------------------------------------- links, locks, files of others


def test_links_are_skipped_and_nothing_leaves_the_folder(tmp_path: Path) -> None:
    """A linked folder of someone's files, a linked video and a linked quarantine: nothing of them
    is moved."""
    root, other = folder(tmp_path / "clips"), tmp_path / "other"
    (other / "cc").mkdir(parents=True)
    thesis, film = other / "cc" / "thesis.tex", other / "film.mp4"
    thesis.write_text("mine")
    film.write_bytes(VIDEO_BYTES)
    (root / "cc").symlink_to(other / "cc")
    one, two, _ = clip_paths(root)
    (one.parent / "notes.txt").symlink_to(thesis)
    one.write_bytes(b"cut")
    one.with_suffix(VIDEO).unlink()
    one.with_suffix(VIDEO).symlink_to(film)
    assert scd("repair", root).exit_code == 0
    assert (
        thesis.read_text() == "mine"
        and film.read_bytes() == VIDEO_BYTES
        and one.with_suffix(VIDEO).is_symlink()
    )
    assert [file.name for file in (root / "quarantine").iterdir()] == [one.name]
    (root / "quarantine" / one.name).unlink()
    (root / "quarantine").rmdir()
    (root / "quarantine").symlink_to(other)
    two.write_bytes(b"cut")
    assert "quarantine: is a link" in str(scd("repair", root).exception)
    assert two.is_file() and not (other / two.name).exists()


def test_commands_hold_their_folder_and_overwrite_nothing_of_others(
    tmp_path: Path, model: Path
) -> None:
    root, out = folder(tmp_path / "clips"), tmp_path / "tars"
    good = tar_of(tmp_path / "good.tar", rcm(0))
    with locked(root, "another job"), locked(out, "another job"):
        for result in (
            scd("repair", root),
            scd("manifest", root),
            scd("export-webdataset", root, out),
            imported(good, out, model),
        ):
            assert "is at work in it" in str(result.exception)
    for name, text in (
        ("index.json", '{"mine": 1}'),
        ("shard-00000.tar", "mine"),
        ("thesis.tex", "mine"),
    ):
        place = tmp_path / f"taken-{name}"
        place.mkdir()
        (place / name).write_text(text)
        assert "nothing of others is overwritten" in str(
            scd("export-webdataset", root, place).exception
        )
        assert [(file.name, file.read_text()) for file in place.iterdir()] == [(name, text)]
    (tmp_path / "mine").mkdir()
    for command in ("repair", "manifest"):
        assert isinstance(scd(command, tmp_path / "mine").exception, UserError)
    assert not list((tmp_path / "mine").iterdir())


def test_names_of_others_cannot_move_the_cursor(tmp_path: Path) -> None:
    root = folder(tmp_path / "clips")
    for name in ("\x1b[2Jx.txt", "a\nb.txt", "\udcff.txt"):
        (clip_paths(root)[0].parent / name).touch()
    for result in (scd("check", root), scd("repair", root)):
        assert (
            "x.txt" in result.stdout
            and "\x1b" not in result.stdout
            and len(result.stdout.splitlines()) == 4
        )
    assert len(list((root / "quarantine").iterdir())) == 3


# ------------------------------------------------------------------------------- damaged, and bombs


def test_one_bad_item_does_not_end_the_import(tmp_path: Path, model: Path) -> None:
    """An empty .pt, a flipped bit, captions that are no text: refused one by one, the rest is
    imported."""
    source = tmp_path / "in"
    source.mkdir()
    flipped = bytearray(rcm(1)["000000001.latent.pt"])
    flipped[len(flipped) // 2] ^= 16
    bad = {name.replace("0001.", "0003."): data for name, data in rcm(1).items()} | {
        "000000003.latent.pt": b""
    }
    bad |= {name.replace("0001.", "0004."): data for name, data in rcm(1).items()} | {
        "000000004.prompt.txt": b"\xff"
    }
    bad |= {name.replace("0001.", "0005."): data for name, data in rcm(1).items()}
    bad |= {"000000005.latent.pt": bytes(flipped)}
    tar_of(source / "0.tar", rcm(0) | bad | rcm(2))
    assert "parts of" in str(imported(source, tmp_path / "out", model).exception)
    assert len(refused(tmp_path / "out")) == 3
    assert {PROMPTS[0], PROMPTS[2]} == set(LatentClips(tmp_path / "out").texts([0, 1]))
    assert "latent.pt: not a file of torch.save" in "\n".join(refused(tmp_path / "out"))


def test_damaged_lmdb_is_named_and_its_counts_are_compared(tmp_path: Path, model: Path) -> None:
    """A file that is cut would kill the process where it is read; a count of a billion would list a
    billion faults."""
    values = torch.stack([latents(number).half() for number in range(3)])
    write_lmdb(tmp_path / "a", values, PROMPTS)
    data = (tmp_path / "a" / "data.mdb").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "data.mdb").write_bytes(data[: len(data) // 2])
    said = str(imported(tmp_path / "cut", tmp_path / "out", model).exception)
    assert "data.mdb has" in said and "(cut?)" in said
    with lmdb.open(str(tmp_path / "a"), map_size=2**24) as env, env.begin(write=True) as put:
        put.put(b"latents_shape", b"999999999 3 4 4 4")
    assert "says 999999999 clips, it has 7 entries" in str(
        imported(tmp_path / "a", tmp_path / "out", model).exception
    )


def test_damaged_parquet_is_named(tmp_path: Path, model: Path) -> None:
    """In its pages, in its footer and cut: no row is lost without a word, and the process lives."""
    write_parquet(parquet_rows(), tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    rng = random.Random(0)
    for number in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(footer if number % 2 else 4, len(data) - 8)] ^= 1 << rng.randrange(8)
        (tmp_path / "a.parquet").write_bytes(
            bytes(data) if number % 9 else good[: rng.randrange(len(good))]
        )
        try:
            parts = list(read_parquet(tmp_path / "a.parquet"))
        except UserError as error:
            assert "a.parquet" in str(error)
        else:
            assert len(parts) == 3 or any(isinstance(part, Refused) for part in parts)
    (tmp_path / "a[1].parquet").write_bytes(good)
    assert len(list(read_parquet(tmp_path / "a[1].parquet"))) == 3, "a name is no pattern"
