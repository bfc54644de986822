"""Parts of a measurement: what dies, fails, hangs or finds its budget spent is recorded, and the
next row runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scd_sf.tools.gpu.parts import (
    AGAIN,
    Figures,
    GpuRecord,
    GpuRow,
    Part,
    measure_rows,
    run_child,
    run_part,
    spoils_the_process,
)
from scd_sf.tools.gpu.report import failures, gpu_markdown, sheets
from scd_sf.types import UserError

LINES: Figures = {"lines": [{"x": 1}]}
# A part's process. A row's name says what becomes of it; the file "cured" heals all.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from scd_sf.tools.gpu.parts import GpuRecord, GpuRow, Part, measure_rows
from scd_sf.types import UserError

here = Path(sys.argv[0]).parent
cured = (here / "cured").exists()

def row(name):
    def measure():
        with (here / "ran").open("a") as file:
            file.write(name + chr(10))
        if cured or name.startswith("good"):
            return {"lines": [{"row": name, "value": 1.5, "fine": True}]}
        print("about to " + name, flush=True)
        if name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hang":
            time.sleep(600)
        raise {"refuse": UserError("no such thing"), "lose the GPU": RuntimeError("CUDA error: misaligned")}[name]
    return GpuRow(name, measure)

part = Part(7, "trials", 100.0, lambda: [row(name) for name in sys.argv[1].split(",")])
sys.exit(measure_rows(part, GpuRecord(here / "out.json"), {"revision": "r", "date": "d"}, float(sys.argv[2])))
"""


def document(record: GpuRecord) -> Any:
    return record.read()["parts"]["7"]


def call(folder: Path, names: str, *, seconds: float = 100.0, grace: float = 60.0) -> GpuRecord:
    (folder / "part.py").write_text(SCRIPT)
    record = GpuRecord(folder / "out.json")
    part = Part(7, "trials", seconds, lambda: [], grace)
    run_part(part, record, [sys.executable, str(folder / "part.py"), names])
    return record


def test_what_fails_is_recorded_and_the_next_row_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    names = "good 1,refuse,die,lose the GPU,good 2"
    record = call(tmp_path, names)
    rows = document(record)["rows"]
    assert list(rows) == names.split(",")
    assert rows["good 1"]["lines"][0]["value"] == 1.5 and rows["good 1"]["revision"] == "r"
    assert rows["refuse"]["error"] == "no such thing" and rows["refuse"]["last_lines"] == []
    assert (
        rows["die"]["error"] == "its process ended: SIGKILL"
        and rows["die"]["last_lines"][-1] == "about to die"
    )
    assert rows["lose the GPU"]["error"] == "RuntimeError: CUDA error: misaligned"
    assert "raise" in " ".join(rows["lose the GPU"]["last_lines"])
    page = gpu_markdown(record.read())
    assert "| good 2 | 1.5 | yes |" in page and "FAILED: die: its process ended: SIGKILL" in page
    # The same command: only what failed runs again.
    (tmp_path / "ran").unlink()
    (tmp_path / "cured").touch()
    assert not [row for row in document(call(tmp_path, names))["rows"].values() if "error" in row]
    assert (tmp_path / "ran").read_text().split("\n")[:-1] == ["refuse", "die", "lose the GPU"]
    # Some rows again, whatever became of them: the others keep what they have. Then all.
    before = document(record)
    record.put(Part(7, "trials", 9.0, lambda: []), {"left_out": ["good 3"]})
    record.begin_again(Part(7, "trials", 9.0, lambda: []), True, "good 2")
    after = document(record)
    assert after["rows"] == {name: row for name, row in before["rows"].items() if name != "good 2"}
    assert after["left_out"] == ["good 3"]
    record.begin_again(Part(7, "trials", 9.0, lambda: []), True)
    assert document(record)["rows"] == {} and document(record)["left_out"] == []


def test_a_spent_budget_leaves_rows_out_and_a_hanging_row_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    part = document(call(tmp_path, "hang,good 1,good 2", seconds=0.5, grace=3.0))
    rows = part["rows"]
    assert part["left_out"] == ["good 1", "good 2"] and list(rows) == ["hang"]
    assert rows["hang"]["error"].startswith("stopped after") and rows["hang"]["last_lines"] == [
        "hang ..",
        "about to hang",
    ]
    short, sheet = sheets({"parts": {"7": part}})
    assert sheet.notes[1] == "left out, as the budget was spent: good 1"
    assert (
        short.tables[0][1] == [["7: trials", "0", "1", "2"]]
        and "the same command goes on" in short.notes[1]
    )


def test_a_part_that_cannot_begin_says_so(tmp_path: Path) -> None:
    record = GpuRecord(tmp_path / "out.json")
    run_part(
        Part(7, "trials", 9.0, lambda: []),
        record,
        [sys.executable, "-c", "raise SystemExit('no such module')"],
    )
    assert document(record)["error"] == "its process ended: exit code 1"
    short, sheet = sheets(record.read())
    assert "NOT RUN: its process ended: exit code 1: no such module" in sheet.notes
    assert short.tables[0][1] == [["7: trials", "0", "1", "0"]] and short.notes[0].startswith(
        "1 FAILED"
    )
    assert failures(document(record)) == 1


def test_a_process_that_ends_in_its_last_second_was_not_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time is over between its end and the end of the timer."""

    class Late:
        def __init__(self, limit: float, stop: Callable[[], None]) -> None:
            self.stop = stop

        def start(self) -> None: ...

        def cancel(self) -> None:
            self.stop()

        def join(self) -> None: ...

    monkeypatch.setattr(threading, "Timer", Late)
    code, figures = run_child([sys.executable, "-c", ""], 9.0)
    assert code == 0 and figures["error"] == "its process ended: exit code 0"


def test_a_part_ends_with_its_caller(tmp_path: Path) -> None:
    """A caller that is killed says nothing to anybody: its part must not go on beside the next
    call's."""
    caller = """
import sys
from pathlib import Path
from scd_sf.tools.gpu.parts import GpuRecord, Part, run_part
part = "from scd_sf.tools.gpu.parts import end_with_the_caller; end_with_the_caller(); import os; "
part += "print(os.getpid(), flush=True)"
command = [sys.executable, "-c", part + "; os.spawnlp(os.P_WAIT, 'sleep', 'sleep', '50')"]
run_part(Part(7, "trials", 60.0, lambda: []), GpuRecord(Path(sys.argv[1])), command)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", caller, str(tmp_path / "out.json")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdout is not None
    group = int(process.stdout.readline())
    os.killpg(group, 0)  # it lives
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(200):
        time.sleep(0.05)
        if not living(group):
            return
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("the part went on")


def living(group: int) -> bool:
    """Whether a process of this group runs; one that nobody has waited for does not."""
    states = subprocess.check_output(["ps", "-A", "-o", "pgid=,stat="], text=True).splitlines()
    return any(
        int(line.split()[0]) == group and not line.split()[1].startswith("Z") for line in states
    )


def test_the_report_says_whether_it_works_and_how_fast() -> None:
    line = {
        "model": "SCD",
        "steps": 4,
        "run": "eager",
        "FPS dit+vae": 8.0,
        "with vae": 0.5,
        "peak GiB": 9.0,
    }
    lines = [
        line,
        line | {"run": "graphs", "FPS dit+vae": 16.0},
        line | {"steps": 2, "FPS dit+vae": 30.0},
    ]
    part = {
        "title": "speed",
        "seconds": 1.0,
        "budget_seconds": 9.0,
        "left_out": [],
        "rows": {"one": {"lines": lines}},
    }
    facts = {
        "device": "H100",
        "driver": "1",
        "memory_gib": 80,
        "versions": {},
        "revision": "r",
        "date": "d",
    }
    old = facts | {"older_than_tested": ["transformers 4.57.1 (>=5.4)"]}
    page = gpu_markdown({"machine": old, "parts": {"2": part}})
    assert "SCD: 16 frames per second at 4 steps, graphs; first frame after 0.5 s, 9 GiB" in page
    assert (
        "Nothing failed: 1 rows" in page
        and "OLDER THAN TESTED: transformers 4.57.1 (>=5.4)" in page
    )
    toy = gpu_markdown({"machine": facts | {"toy": True}, "parts": {"2": part}})
    assert (
        "It says nothing about a GPU" in toy
        and "speed, AT TOY SIZE" in toy
        and "16 frames per second" not in toy
    )


def test_rows_of_another_machine_are_refused(tmp_path: Path) -> None:
    record, part = (
        GpuRecord(tmp_path / "sub" / "out.json"),
        Part(7, "trials", 9.0, lambda: [GpuRow("a", lambda: LINES)]),
    )
    machine: Figures = {"device": "H100", "versions": {"torch": "2.11.0"}}
    record.on({"device": "A100"})
    record.on(machine)  # nothing was measured yet
    measure_rows(part, record, {}, 9.0)
    record.on(machine | {"date": "tomorrow"})
    with pytest.raises(UserError, match="holds figures of device 'H100', this is 'A100'"):
        record.on(machine | {"device": "A100"})
    with pytest.raises(UserError, match=r"holds figures of versions .*2\.11.*, this is .*2\.14"):
        record.on(machine | {"versions": {"torch": "2.14.0"}})
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not a document of this script"):
        GpuRecord(tmp_path / "x.json").read()
    for damaged in (
        '{"schema": 1, "machine": null, "parts": {"1": {}}}',
        '{"schema": 1, "parts": {}}',
    ):
        (tmp_path / "x.json").write_text(damaged)
        with pytest.raises(UserError, match=r"x\.json.*name another file with --out"):
            GpuRecord(tmp_path / "x.json").read()


def test_what_is_no_measurement_is_a_failure(tmp_path: Path) -> None:
    record = GpuRecord(tmp_path / "out.json")
    found: dict[str, list[dict[str, object]]] = {
        "empty": [],
        "nan": [{"loss": float("nan"), "fine": True}],
        "good": [{"loss": 1.0, "gib": None}],
    }
    rows = [GpuRow(name, partial(dict, lines=lines)) for name, lines in found.items()]
    part = Part(7, "trials", 9.0, lambda: rows)
    assert measure_rows(part, record, {}, 9.0) == 0
    errors = {name: row.get("error") for name, row in document(record)["rows"].items()}
    assert errors == {"empty": "nothing was measured", "nan": "not finite: loss", "good": None}
    assert failures(document(record)) == 2
    record.begin_again(part, False, "nan")
    assert list(document(record)["rows"]) == ["empty", "good"], (
        "--only forgot a failure that it does not try again"
    )
    record.put(part, {"left_out": ["empty", "good"]})
    record.begin_again(part, True, "empty")
    assert list(document(record)["rows"]) == document(record)["left_out"] == ["good"]
    assert (
        measure_rows(
            Part(7, "trials", 9.0, lambda: [GpuRow("new", lambda: LINES)]), record, {}, 9.0
        )
        == 0
    )
    assert list(document(record)["rows"]) == ["new"], "rows that are no more remain"
    measure_rows(
        Part(7, "trials", 9.0, lambda: [GpuRow("new", lambda: LINES), GpuRow("b", lambda: LINES)]),
        record,
        {},
        0.0,
    )
    assert document(record)["left_out"] == ["b"]


def test_memory_that_is_gone_takes_a_fresh_process(tmp_path: Path) -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    def fail() -> Figures:
        raise OutOfMemoryError("tried to allocate")

    part = Part(7, "trials", 9.0, lambda: [GpuRow("big", fail), GpuRow("next", lambda: LINES)])
    record = GpuRecord(tmp_path / "out.json")
    assert measure_rows(part, record, {}, 9.0) == AGAIN
    assert list(document(record)["rows"]) == ["big"]
    assert measure_rows(part, record, {}, 9.0, only="next") == 0 and list(
        document(record)["rows"]
    ) == ["big", "next"]
    for words in (
        "CUDA error",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "NCCL error: unhandled cuda error",
    ):
        assert spoils_the_process(RuntimeError(words)), words
    assert not spoils_the_process(AssertionError("differs"))
