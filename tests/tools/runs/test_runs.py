"""`scd runs`: what a run directory says, read while it is written, cut, damaged or hostile; and two
runs compared."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from scd_sf import cli
from scd_sf.checkpoint import Checkpoints, provenance
from scd_sf.tools.runs.curve import TAIL_BYTES, read_curve, read_tail
from scd_sf.tools.runs.state import find_runs, read_run
from scd_sf.types import UserError

NOW = 1_700_000_000.0


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def a_run(
    root: Path,
    steps: int = 5,
    *,
    total: int = 10,
    loss: float = 1.0,
    saved: tuple[int, ...] = (2, 4),
) -> Path:
    """``steps`` records, one a second, the last at NOW; checkpoints after ``saved``."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(
        f"init: runs/stage1\ntrain: {{steps: {total}, global_batch: 4}}\n"
    )
    rows = [
        {"step": s, "time": NOW - steps + s, "loss": loss / s, "lr": 0.1}
        for s in range(1, steps + 1)
    ]
    (root / "metrics.jsonl").write_text(lines(*rows))
    for step in saved:
        record = provenance(
            stage="stage2_flow_matching", step=step, seed=3, parents=[Path("runs/stage1")]
        )
        Checkpoints(root / "checkpoints").write(step, {"model": {"w": torch.ones(4)}}, "", record)
    return root


def beat(run: Path, rank: int, age: float, now: float = NOW, host: str = "node7") -> None:
    (run / "heartbeat").mkdir(exist_ok=True)
    text = json.dumps({"time": now - age, "step": 5, "pid": 40 + rank, "host": host})
    (run / "heartbeat" / f"rank_{rank:05d}.json").write_text(text)


def scd(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``scd runs ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["scd", "runs", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_curve_survives_what_files_hold(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [
        {"step": 1, "time": 5.0, "loss": 1.0},
        {"step": 2, "loss": None, "note": "text", "flag": True},
    ]
    junk = (
        '{"step": "3", "loss": 1}\n[1]\n7\n{"loss": 1}\n{"step": 1.5}\n\xff\n\n' + "[" * 5000 + "\n"
    )
    again = [
        {"step": 4, "loss": 4.0},
        {"step": 5, "loss": 5.0},
        {"step": 4, "loss": 40.0, "grad_norm": 1},
    ]
    file.write_bytes((lines(*good) + junk + lines(*again) + '{"step": 5, "lo').encode("latin-1"))
    curve = read_curve(tmp_path)
    assert list(curve.steps) == [1, 2, 4]  # step 5 was before the run went on from step 3
    assert curve.steps[4] == {"loss": 40.0, "grad_norm": 1.0}
    assert (
        math.isnan(curve.steps[2]["loss"])
        and "note" not in curve.steps[2]
        and "flag" not in curve.steps[2]
    )
    assert (curve.unreadable, curve.last) == (7, 4)
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 3.0}')
    assert read_curve(file).last == 2, "a whole last record counts without its line end"
    with pytest.raises(UserError, match="no record with a step"):
        (tmp_path / "empty.jsonl").write_text("{}\n")
        read_curve(tmp_path / "empty.jsonl")


def test_100k_lines_are_read_quickly_and_the_tail_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = (
        {"step": s, "time": NOW + s, "loss": 1 / s, "grad_norm": s / 7, "lr": 1e-4}
        for s in range(1, 100_001)
    )
    file.write_text(lines(*rows))
    started = time.process_time()
    assert len(read_curve(file).steps) == 100_000
    assert time.process_time() - started < 5.0, "this bound only catches a wrong order of growth"
    tail = read_tail(file)
    assert tail.last == 100_000 and tail.unreadable == 0 and 100 < len(tail.steps) < TAIL_BYTES / 50
    assert tail.seconds_per_step() == 1.0


def test_states(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    view = read_run(run, NOW + 3)
    assert (view.state, view.reason, view.age, view.total) == ("running", "", 3.0, 10)
    assert (view.stage, [s.step for s in view.checkpoints]) == ("stage2_flow_matching", [2, 4])
    assert read_run(run, NOW + 119).state == "running" and read_run(run, NOW + 121).state == "stale"
    assert read_run(run, NOW + 30, stale_after=20).reason == "no sign of life for 30 s"

    status = {"state": "interrupted", "time": NOW + 1, "reason": "SIGTERM", "step": 5}
    (run / "status.json").write_text(json.dumps(status))
    view = read_run(run, NOW + 500)
    assert (view.state, view.reason) == ("stopped", "interrupted: SIGTERM")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines({"step": 6, "time": NOW + 60, "loss": 0.1}))
    assert read_run(run, NOW + 61).state == "running", "it went on since"

    done = a_run(tmp_path / "done", 4, total=4)
    assert read_run(done, NOW + 10**6).state == "finished"
    model = done / "checkpoints" / "step_00000004" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    view = read_run(done, NOW + 10**6)
    assert view.state == "stale" and [saved.intact for saved in view.checkpoints] == [True, False]
    with pytest.raises(UserError, match="no run directory"):
        read_run(tmp_path, NOW)
    assert find_runs(tmp_path) == [done, run]


def test_ranks_that_are_silent_stuck_or_of_an_earlier_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    beat(run, 0, 1)
    beat(run, 1, 400, host="node8\x1b[2J")
    (run / "heartbeat" / "rank_00002.json").write_text('{"ti')
    view = read_run(run, NOW)
    assert (
        view.state == "stale"
        and view.reason.startswith("rank 1 on node8")
        and "7 min (step 5)" in view.reason
    )
    (run / "status.json").write_text(json.dumps({"state": "running", "time": NOW - 200}))
    view = read_run(run, NOW)
    assert view.state == "running" and [b.rank for b in view.heartbeats] == [0], (
        "this job has one rank"
    )
    beat(run, 0, -590)
    assert read_run(run, NOW + 595).state == "running"
    assert read_run(run, NOW + 605).reason == "ranks live, but no step for 10 min"
    (run / "status.json").write_text(json.dumps({"state": "running", "time": NOW + 300.0}))
    assert read_run(run, NOW + 605).state == "running", "it resumed 305 s ago"
    assert read_run(run, NOW + 1000).reason == "no sign of life for 7 min"

    (run / "status.json").unlink()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    beat(run, 0, 1, now)
    beat(run, 1, 1, now - 3600, host="node8\x1b[2J")
    code, out, _ = scd(["show", run], monkeypatch, capsys)
    assert code == 0 and "\x1b" not in out
    assert (
        "rank 1: 60 min ago, step 5, pid 41 on node8\ufffd[2J - STALE" in out
        and "rank 0: 1 s ago" in out
    )


def test_show_list_and_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "a" / "run\x1b]0;x\x07")
    (run / "skipped.jsonl").write_text(
        lines({"step": 3, "samples": [1]}, {"step": 3, "samples": [1]}) + '{"st'
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines({"step": 6, "time": NOW + 1, "val/[red]\x1b[31m": 2.5}))
    a_run(tmp_path / "finished", 3, total=3, saved=(3,))
    code, out, _ = scd(["ls", tmp_path], monkeypatch, capsys)
    assert code == 0 and "\x1b" not in out and "\x07" not in out
    assert "a/run\ufffd]0;x\ufffd" in out and "6/10" in out and "stale: no sign of life" in out
    assert "3/3" in out and "finished" in out and "3 (sizes agree)" in out
    code, out, _ = scd(["show", run], monkeypatch, capsys)
    assert code == 0 and "\x1b" not in out
    for part in (
        "runs/stage1",
        "1 s/step, 3600 steps/h",
        "4 (sizes agree)",
        "updates: 1, the last at step 3",
        "no heartbeats",
        "train.global_batch=4",
        "val/[red]\ufffd[31m",
        "2.5",
    ):
        assert part in out
    code, out, _ = scd(["watch", run, "--once"], monkeypatch, capsys)
    assert code == 0 and "loss" in out and "6/10" in out and "stale" in out and "\x1b" not in out
    assert "what the optimiser minimises" in scd(["show", run], monkeypatch, capsys)[1]
    event = {
        "kind": "static",
        "step": 4,
        "reason": "quick/motion is 0",
        "looks": "still\x1b pictures",
    }
    event["remedy"] = "a lower lr"
    (run / "alarms.json").write_text(json.dumps({"settled": {}, "events": [event]}))
    out = scd(["show", run], monkeypatch, capsys)[1]
    assert "ALARM static, since step 4: quick/motion is 0" in out and "\x1b" not in out
    assert "still\ufffd pictures" in out and "a lower lr" in out
    out = scd(["watch", run, "--once"], monkeypatch, capsys)[1]
    assert "ALARM static since step 4" in out.replace("\n", " ")
    assert scd(["watch", tmp_path / "finished"], monkeypatch, capsys)[0] == 0, (
        "a finished run is not followed"
    )
    code, _, err = scd(["ls", tmp_path / "nowhere"], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and "no such folder" in err


def test_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, same = a_run(tmp_path / "first"), a_run(tmp_path / "same", 4)
    rows = [
        {"step": s, "loss": 1.0 / s + (1e-3 if s == 3 else 0), "lr": 0.1, "more": 1.0}
        for s in range(1, 8)
    ]
    other = tmp_path / "other.jsonl"
    other.write_text(lines(*rows))

    def compare(*arguments: object) -> tuple[int, str, str]:
        return scd(["compare", *arguments], monkeypatch, capsys)

    code, out, _ = compare(first, same, "--tolerance", "0")
    assert code == 0 and "4 common steps, 1 to 4" in out and out.count("same bits, 4 steps") == 2
    code, out, _ = compare(first, other)
    assert code == 0 and "step 3" in out and "0.001 at 3" in out and "only in b: more" in out
    assert compare(first, other, "--tolerance", "0.002")[0] == 0
    code, out, _ = compare(first, same, other, "--tolerance", "0.0009")
    assert code == 1 and "different: beyond tolerance 0.0009" in out
    assert compare(first, other, "--tolerance", "0.0009", "--metric", "lr")[0] == 0
    code, out, _ = compare(other, first, "--tolerance", "1")
    assert code == 1 and "never in both" in out, "the reference's metric 'more' is missing"
    late = tmp_path / "late.jsonl"
    late.write_text(lines({"step": 90, "loss": 1.0}))
    code, _, err = compare(first, late)
    assert code == 2 and "no step in common" in err
    holes = tmp_path / "holes.jsonl"
    holes.write_text(lines({"step": 1, "loss": None}, {"step": 2, "loss": None}))
    assert (
        compare(holes, holes, "--tolerance", "0")[0] == 0
        and compare(holes, other, "--tolerance", "9")[0] == 1
    )


def test_export_keeps_no_trace_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "curves" / "run.jsonl"
    machine = {
        "time": NOW,
        "seconds": 1.0,
        "speed/steps_per_second": 2.0,
        "memory/peak_gib": 3.0,
        "seconds_per_step": 4.0,
    }
    kept = {"loss": 0.1, "val/loss": None, "lr": 0.1, "timestep_mean": 5.0}
    (run / "metrics.jsonl").write_text(lines({"step": 1, **machine, **kept}))
    code, text, _ = scd(["export", run, out], monkeypatch, capsys)
    assert code == 0 and "1 steps" in text
    assert json.loads(out.read_text()) == {"step": 1, **kept}
    assert scd(["compare", out, run, "--tolerance", "0"], monkeypatch, capsys)[0] == 0
    code, _, err = scd(["export", run, out], monkeypatch, capsys)
    assert code == 2 and "nothing is overwritten" in err


HOSTILE: dict[str, tuple[str, str]] = {
    "a rank of another script": (
        "heartbeat/rank_\u00b2.json",
        '{"time": 1.7e9, "step": 1, "pid": 1, "host": "h"}',
    ),
    "a beat of wrong types": (
        "heartbeat/rank_00000.json",
        '{"time": "now", "step": [], "pid": null, "host": 5}',
    ),
    "a beat that is a list": ("heartbeat/rank_00000.json", "[1]"),
    "deep status": ("status.json", "[" * 100_000),
    "status of wrong types": ("status.json", '{"state": ["failed"], "time": {}, "reason": 3}'),
    "a long number": ("status.json", f'{{"state": "failed", "time": {"9" * 5000}}}'),
    "alarms of wrong types": ("alarms.json", '{"events": [{"kind": 3}]}'),
    "endless skips": (
        "skipped.jsonl",
        '{"step": 1e999}\n{"step": null}\n' + "[" * 100_000 + "\n\udc80\n{}",
    ),
    "config that is none": ("config.yaml", "train: {steps: [1]}\nrun: {heartbeat_seconds: {}}\n"),
    "a config bomb": ("config.yaml", "a: &a [1]\nb: [*a, *a]\n"),
    "huge values": (
        "metrics.jsonl",
        '{"step": 1, "time": 1e308, "loss": 1e308}\n{"step": 2, "time": 1.1e308, "loss": 1e308}\n',
    ),
    "huge steps": (
        "metrics.jsonl",
        f'{{"step": {"9" * 400}, "time": 1.0}}\n{{"step": 3, "loss": 1}}\n',
    ),
    "a manifest of wrong types": ("checkpoints/step_00000004/manifest.json", '{"files": 3}'),
    "provenance of wrong types": (
        "checkpoints/step_00000004/provenance.json",
        '{"parents": 3, "versions": []}',
    ),
}


def test_a_damaged_run_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listed beside the others, and shown; what is damaged in it is left out."""
    for number, (file, text) in enumerate(HOSTILE.values()):
        bad = a_run(tmp_path / f"bad{number}")
        (bad / file).parent.mkdir(exist_ok=True)
        (bad / file).write_bytes(text.encode("utf-8", "surrogateescape"))
        code, out, err = scd(["show", bad], monkeypatch, capsys)
        assert code == 0 and "stage" in out, (file, err)
    code, out, _ = scd(["ls", tmp_path], monkeypatch, capsys)
    assert code == 0 and out.count("bad") == len(HOSTILE)


def test_a_curve_is_followed_as_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``watch`` reads again what was written meanwhile, and ends with the run."""
    run = a_run(tmp_path / "run", 4, total=5)

    def sleep(seconds: float) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines({"step": 5, "time": NOW + 1, "loss": 0.125}) + '{"step": 6, "lo')
        Checkpoints(run / "checkpoints").write(
            5,
            {"model": {"w": torch.ones(4)}},
            "",
            provenance(stage="stage2_flow_matching", step=5, seed=3, parents=[]),
        )

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = scd(["watch", run], monkeypatch, capsys)
    assert code == 0 and "finished, step 5/5" in out and "loss 0.125" in out
