"""Files: written whole or not at all, held by one process, and whatever is wrong in those of others
is one line."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
import torch

from scd_sf.files import (
    current_umask,
    files_below,
    foreign,
    fsync_tree,
    lines_of,
    locked,
    new_file,
    new_folder,
    own_file,
    parse_json,
    part_of,
    read_bytes,
    read_json,
    read_jsonl,
    require_own_folder,
    typed,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from scd_sf.types import UserError, exit_on_user_error

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


def test_a_file_appears_whole_or_not_at_all_with_the_rights_of_the_umask(tmp_path: Path) -> None:
    """A failed write leaves the old contents and nothing beside them; tensors are as readable as
    any other file."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), new_file(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2)}, {"k": "v"})
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o666 & ~current_umask()


def test_a_folder_appears_whole_and_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    """Never over something that is there; parts of a dead process go, those of a live one and
    strangers' files stay."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = part_of(tmp_path / "x").name.rsplit("-", 2)
    (tmp_path / f"{mine[0]}-{dead.pid}-0123abcd").mkdir()
    alive, stranger = (
        tmp_path / f"{mine[0]}-{os.getpid()}-0123abcd",
        tmp_path / ".part-of something",
    )
    alive.mkdir()
    stranger.write_text("s")
    with new_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", alive.name, stranger.name}
    with pytest.raises(UserError, match="never overwritten"), new_folder(tmp_path / "out"):
        pass


def test_what_another_rank_is_still_writing_does_not_fail_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks write into one folder of the training state; each flushes it while others rename
    their files there."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    unfinished = part_of(tmp_path / "x")
    unfinished.mkdir()
    (unfinished / "tensors").write_text("t")
    flushed: list[str] = []

    def fsync(path: Path) -> None:
        if not flushed:  # the folder has been listed: the other file goes
            (tmp_path / ({"a", "b"} - {path.name}).pop()).unlink()
        path.stat()
        flushed.append(path.name)

    monkeypatch.setattr("scd_sf.files.fsync", fsync)
    fsync_tree(tmp_path)
    assert flushed in (["a", tmp_path.name], ["b", tmp_path.name])


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    """The second is refused and hears who holds it; a process that ended holds nothing."""
    code = "import sys; from pathlib import Path; from scd_sf.files import locked\n"
    code += "with locked(Path(sys.argv[1]), 'b'): pass"
    with locked(tmp_path, "samples"):
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert f"process {os.getpid()}" in second.stderr and "is at work in it" in second.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["link", "text", "folder", "pipe"])
def test_a_lock_is_taken_over_from_nobody(tmp_path: Path, kind: str) -> None:
    """A file of others that is called so, or a link to one, keeps its contents."""
    other, lock = tmp_path / "other", tmp_path / "in" / ".lock"
    other.write_text("other")
    lock.parent.mkdir()
    make: dict[str, Callable[[], object]] = {
        "link": lambda: lock.symlink_to(other),
        "text": lambda: lock.write_text("mine"),
        "folder": lock.mkdir,
    }
    make.get(kind, lambda: os.mkfifo(lock))()
    with pytest.raises(UserError, match="not a lock of ours"), locked(lock.parent, "samples"):
        pass
    assert other.read_text() == "other" and (kind != "text" or lock.read_text() == "mine")


def test_a_job_clears_what_killed_ones_left_below(tmp_path: Path) -> None:
    """In folders of folders too; what a living process or somebody else has is left."""
    (tmp_path / ".done" / "videos").mkdir(parents=True)
    alive = part_of(tmp_path / ".done" / "x")
    dead = alive.with_name(alive.name.replace(f"-{os.getpid()}-", "-999999999-"))
    for file in (
        alive,
        dead,
        tmp_path / ".done" / "videos" / dead.name,
        tmp_path / dead.name,
        tmp_path / ".part-mine",
    ):
        file.write_text("half")
    with locked(tmp_path, "samples"):
        left = {path.name for path in tmp_path.rglob(".part-*")}
    assert left == {alive.name, ".part-mine"}


def test_a_job_that_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    """No lock in a folder of others, no folder that it made; what was there before stays, an old
    lock too."""
    others, made = tmp_path / "others", tmp_path / "made"
    others.mkdir()
    (others / "mine.txt").write_text("mine")
    for folder in (others, made):
        with pytest.raises(UserError, match="not ours"), locked(folder, "samples"):
            assert (folder / ".lock").is_file()
            raise UserError("not ours")
    assert [path.name for path in others.iterdir()] == ["mine.txt"] and not made.exists()
    with locked(others, "samples"):
        pass
    with pytest.raises(UserError), locked(others, "samples"):
        raise UserError("not ours")
    assert (others / ".lock").is_file()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere" / "x")
    for place, said in ((others / "mine.txt", "is no folder"), (link, "is a link to nothing")):
        with pytest.raises(
            UserError,
            match=rf"{place.name}: is there and {said}; .*: use another place for samples",
        ):
            locked(place, "samples").__enter__()
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_that_its_owner_removed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before, taken after a refused job removed it: the one of that name is taken
    instead."""
    flock, lock = fcntl.flock, tmp_path / ".lock"
    removed: list[Path] = []

    def late(file: object, how: int) -> None:
        if not removed:
            lock.unlink()
            removed.append(lock)
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path, "samples"):
        assert lock.read_text().startswith(f"process {os.getpid()}")
        with pytest.raises(UserError, match="at work in it"), locked(tmp_path, "samples"):
            pass


def test_a_file_that_a_person_named(tmp_path: Path) -> None:
    """Among files of others: what killed runs left beside it goes, and a new one never takes
    another's place, also one that came meanwhile."""
    path, dead = tmp_path / "page.html", part_of(tmp_path / "x")
    dead = dead.with_name(dead.name.replace(f"-{os.getpid()}-", "-999999999-"))
    dead.mkdir()
    (tmp_path / ".part-mine").write_text("mine")
    for words in ("one", "two"):
        with own_file(path) as part:
            assert part.name == path.name and not dead.exists()
            part.write_text(words)
    with pytest.raises(UserError, match=r"page\.html: exists already"), own_file(path, fresh=True):
        raise AssertionError
    path.unlink()
    with (
        pytest.raises(UserError, match=r"page\.html: exists already"),
        own_file(path, fresh=True) as part,
    ):
        part.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and sorted(p.name for p in tmp_path.iterdir()) == [
        ".part-mine",
        "page.html",
    ]


def test_errors_name_the_file_and_not_its_part(tmp_path: Path) -> None:
    """Also those of PyAV, whose name cannot be set: a disk that is full while a video is
    written."""
    for error in (
        av.error.OSError(errno.ENOSPC, "No space left on device", str(part_of(tmp_path / "x"))),
        OSError(errno.ENOSPC, "No space left on device", str(part_of(tmp_path / "x") / "in")),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        with pytest.raises(OSError, match="No space left") as caught, new_file(tmp_path / "a.mp4"):
            raise error
        assert (caught.value.errno, caught.value.filename) == (
            errno.ENOSPC,
            str(tmp_path / "a.mp4"),
        )


SAVE = {
    "tensors": "write_tensors(path, {'a': torch.zeros(10**5)})",
    "torch": """
with new_file(path) as part, part.open("wb") as file: torch.save(torch.zeros(10**5), file)""",
    "text": "write_text(path, 'x' * 10**5)",
}


@pytest.mark.parametrize("kind", SAVE)
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(
    tmp_path: Path, kind: str
) -> None:
    """Whoever writes: Python, safetensors, torch."""
    code = "import resource, sys, torch; from pathlib import Path; from scd_sf.files import *\n"
    code += "from scd_sf.types import exit_on_user_error; path = Path(sys.argv[1]) / 'made'\n"
    code += f"def main():\n  {SAVE[kind].strip()}\nmain(); assert path.stat().st_size > 10**5 - 1; path.unlink()\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\nexit_on_user_error(main)"
    end = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (
        end.returncode == 2
        and end.stderr.startswith(f"error: {tmp_path / 'made'}: ")
        and "GB free" in end.stderr
    )
    assert end.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_of_others_is_known(tmp_path: Path) -> None:
    """Locks and what is unfinished are ours; anything else needs the command's own file beside
    it."""
    out = tmp_path / "out"
    require_own_folder(out, ["report.json"])
    with locked(out, "a list"):
        part_of(out / "x").write_text("unfinished")
        require_own_folder(out, ["report.json"])
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(
        UserError,
        match=r"out: holds other files \(thesis\.txt\) and no report\.json of ours; .*: use another",
    ):
        require_own_folder(out, ["report.json"])
    (out / "report.json").write_text("{}")
    require_own_folder(out, ["report.json", "building.json"])
    with pytest.raises(UserError, match=r"report\.json: is there and no folder"):
        require_own_folder(out / "report.json", [])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200 + "]" * 200,
        "1e999",
        "NaN",
        '"\\ud800"',
        "9" * 30,
        '{"a": ' * 5000 + "1" + "}" * 5000,
        "",
        "{",
    ],
)
def test_json_of_others_is_bounded(text: str) -> None:
    with pytest.raises(UserError, match=r"^f: not JSON .*; fix it$"):
        parse_json(text, "f", "fix it")


def test_what_is_no_json_is_not_written(tmp_path: Path) -> None:
    """A file with NaN in it is refused by our own readers, by jq and by browsers. What is there
    stays."""
    file, rows = tmp_path / "a.json", tmp_path / "a.jsonl"
    write_json(file, {"a": 1.5, "b": None})
    write_jsonl(rows, [{"a": "1 \u2028"}, {"b": [1]}])
    with pytest.raises(
        UserError, match=r"a\.json: 'b\.1\.c' is NaN or infinite, which is no JSON; "
    ):
        write_json(file, {"a": 1.0, "b": ({}, {"c": math.nan})})
    with pytest.raises(UserError, match=r"a\.jsonl:2: 'x' is NaN or infinite"):
        write_jsonl(rows, [{}, {"x": -math.inf}])
    assert read_json(file, "fix it") == {"a": 1.5, "b": None}
    assert read_jsonl(rows, "fix it") == [{"a": "1 \u2028"}, {"b": [1]}]


@dataclass
class Entry:
    size: int
    name: str = ""


def test_typed_values_name_the_field(tmp_path: Path) -> None:
    assert typed({"a": {"size": 3, "more": 1}}, dict[str, Entry], "f", "fix it") == {"a": Entry(3)}
    with pytest.raises(
        UserError, match=r"f: Expected `int`, got `str` - at `\$\[\.\.\.\]\.size`; fix it"
    ):
        typed({"a": {"size": "3"}}, dict[str, Entry], "f", "fix it")


def test_only_line_feeds_end_a_line() -> None:
    assert lines_of("a\u2028b\x0bc\x85d\r\ne\rf\n\n") == ["a\u2028b\x0bc\x85d", "e\rf", ""]


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a regular file"):
        read_bytes(Path("/dev/zero"), "fix it")
    (tmp_path / "big").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="100 bytes, more than the 10"):
        read_bytes(tmp_path / "big", "fix it", 10)
    with (
        pytest.raises(UserError, match=r"big: not good; fix it"),
        foreign(tmp_path / "big", "fix it"),
    ):
        raise ValueError("not good\nsecond line")


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    (tmp_path / "out").write_text("o")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "folder").symlink_to(tmp_path)
    assert [p.name for p in files_below(tmp_path / "in")] == ["a"]


def test_how_jobs_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one clean line for input and places, 130 for Ctrl-C; a fault of ours keeps
    its traceback."""

    def ended(error: BaseException) -> tuple[object, str]:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(main)
        return caught.value.code, capsys.readouterr().err

    assert ended(UserError("bad \x1b[31mred\nline")) == (2, "error: bad \ufffd[31mred line\n")
    code, words = ended(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "f")))
    assert code == 2 and f"{tmp_path / 'f'}: No space left" in words and "GB free" in words
    for number in (errno.EACCES, errno.EEXIST):
        code, words = ended(OSError(number, "said", str(tmp_path / "f")))
        assert (
            code == 2
            and f"{tmp_path / 'f'}: " in words
            and "room" not in words
            and words.count("\n") == 1
        )
    long = tmp_path / ("x" * 300) / "y"  # no part of which can be looked up
    code, words = ended(OSError(errno.ENAMETOOLONG, "File name too long", str(long)))
    assert code == 2 and "File name too long" in words and words.count("\n") == 1
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        assert ended(error)[0] == 2
    for stop in (KeyboardInterrupt(), SystemExit(130)):  # the second from typer
        assert ended(stop) == (130, "interrupted; the same command goes on where it stopped\n")
    assert ended(SystemExit(3)) == (3, "")
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: print(1 / 0))
