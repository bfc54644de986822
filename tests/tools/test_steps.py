"""The step runner: finished steps stay finished, a changed command runs again, a failure is named,
groups overlap."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_runner

from scd_sf.tools.steps import Step, chain, run_steps
from scd_sf.types import UserError


def shell(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def test_finished_steps_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [[Step("count", shell(f"echo once >> {tmp_path}/count; echo done"), 1)]]
    first = run_steps(tmp_path / "run", groups)
    second = run_steps(tmp_path / "run", groups)
    assert (tmp_path / "count").read_text() == "once\n"
    assert first == second and first.keys() == {"count"}
    assert "[1/1] count  finished before" in capsys.readouterr().out
    assert (tmp_path / "run" / "logs" / "count.log").read_text() == "done\n"
    marker = json.loads((tmp_path / "run" / ".done" / "count.json").read_text())
    assert marker["command"] == groups[0][0].command


def test_changed_command_runs_again(tmp_path: Path) -> None:
    for word in ("one", "two", "two"):
        run_steps(tmp_path / "run", [[Step("say", shell(f"echo {word} >> {tmp_path}/words"), 1)]])
    assert (tmp_path / "words").read_text() == "one\ntwo\n"


def test_environment_is_added(tmp_path: Path) -> None:
    run_steps(
        tmp_path, [[Step("env", shell('echo "$WORD $PYTHONUNBUFFERED"'), 1, {"WORD": "meadow"})]]
    )
    assert (tmp_path / "logs" / "env.log").read_text() == "meadow 1\n"


def test_failure_names_step_and_log_and_stops(tmp_path: Path) -> None:
    """What is after it does not run; after the repair only it and what is after it run."""
    bad = Step("second", shell(f"echo broken cable; test -e {tmp_path}/repaired"), 1)
    groups = [
        [Step("first", shell(f"echo x >> {tmp_path}/first"), 1)],
        [bad],
        [Step("third", shell("true"), 1)],
    ]
    with pytest.raises(UserError) as caught:
        run_steps(tmp_path, groups)
    text = str(caught.value)
    assert (
        "step 'second' failed (exit 1): broken cable" in text
        and f"{tmp_path}/logs/second.log" in text
    )
    assert "\n" not in text and not (tmp_path / ".done" / "third.json").exists()
    (tmp_path / "repaired").touch()
    assert run_steps(tmp_path, groups).keys() == {"first", "second", "third"}
    assert (tmp_path / "first").read_text() == "x\n"


def test_silent_failure_and_killed_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'quiet' failed \(exit 3\): no output"):
        run_steps(tmp_path, [[Step("quiet", shell("exit 3"), 1)]])
    with pytest.raises(UserError, match=r"'killed' failed \(exit -9\)"):
        run_steps(tmp_path, [[Step("killed", shell("kill -9 $$"), 1)]])


def test_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 'ghost': cannot start 'no-such-program'"):
        run_steps(tmp_path, [[Step("ghost", ["no-such-program"], 1)]])


def test_steps_of_a_group_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other's file: one after another would never end."""
    meet = "touch {0}; while ! test -e {1}; do sleep 0.01; done"
    names = (f"{tmp_path}/a", f"{tmp_path}/b")
    group = [
        Step("left", shell(meet.format(*names)), 1),
        Step("right", shell(meet.format(*reversed(names))), 1),
    ]
    assert run_steps(tmp_path / "run", [group]).keys() == {"left", "right"}


def test_no_more_than_asked_run_at_once(tmp_path: Path) -> None:
    """Five steps, two at a time: the first waits until the others have ended, and they say how many
    they see running."""
    wait = "touch on.0; while ! test -e end.4; do sleep 0.01; done; rm on.0"
    count = "touch on.{0}; while ! test -e on.0; do sleep 0.01; done; "
    count += "ls -d on.* | wc -l >> seen; rm on.{0}; touch end.{0}"
    works = [wait, *(count.format(number) for number in range(1, 5))]
    group = [Step(f"s{n}", shell(f"cd {tmp_path}; {work}"), 1) for n, work in enumerate(works)]
    assert len(run_steps(tmp_path / "run", [group], at_once=2)) == 5
    assert (tmp_path / "seen").read_text().split() == ["2"] * 4


def test_a_finished_member_of_a_failed_group_is_kept(tmp_path: Path) -> None:
    group = [
        Step("bad", shell(f"echo no >&2; test -e {tmp_path}/repaired"), 1),
        Step("good", shell(f"echo x >> {tmp_path}/good"), 1),
    ]
    with pytest.raises(UserError, match=r"'bad' failed \(exit 1\): no"):
        run_steps(tmp_path / "run", [group])
    (tmp_path / "repaired").touch()
    run_steps(tmp_path / "run", [group])
    assert (tmp_path / "good").read_text() == "x\n"


def test_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the run directory"):
        run_steps(tmp_path / "file" / "run", [])


def test_damaged_marker_means_not_finished(tmp_path: Path) -> None:
    """A marker cut short by a crash must not stop the chain."""
    groups = [[Step("again", shell(f"echo x >> {tmp_path}/again"), 1)]]
    run_steps(tmp_path / "run", groups)
    (tmp_path / "run" / ".done" / "again.json").write_text("{")
    run_steps(tmp_path / "run", groups)
    assert (tmp_path / "again").read_text() == "x\nx\n"


def test_a_step_whose_outputs_are_gone_runs_again(tmp_path: Path) -> None:
    """The whole folder, one file of it, or a single file; not what it never promised. Steps that
    kept theirs stay."""
    run, folder, file = tmp_path / "run", tmp_path / "made", tmp_path / "one.json"
    make = f"echo x >> {tmp_path}/count; mkdir -p {folder}/deep; touch {folder}/deep/a {folder}/b {folder}/.lock {file}"
    other = Step(
        "other",
        shell(f"echo x >> {tmp_path}/other; touch {tmp_path}/kept"),
        1,
        outputs=[tmp_path / "kept"],
    )
    groups = [[Step("make", shell(make), 1, outputs=[folder, file]), other]]

    def times() -> int:
        run_steps(run, groups)
        return len((tmp_path / "count").read_text().split())

    assert times() == 1 and times() == 1
    (folder / ".lock").unlink()
    assert times() == 1
    for count, damage in enumerate((folder / "deep" / "a", file, folder), 2):
        shutil.rmtree(damage) if damage.is_dir() else damage.unlink()
        assert times() == count and damage.exists() and times() == count
    assert (tmp_path / "other").read_text() == "x\n"
    marker = run / ".done" / "make.json"  # as older versions wrote it
    saved = json.loads(marker.read_text())
    marker.write_text(json.dumps({name: saved[name] for name in ("command", "seconds")}))
    assert times() == 4
    file.unlink()
    assert times() == 5


def test_a_step_that_leaves_less_than_it_promised_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'idle' ended without {tmp_path}/nothing"):
        run_steps(
            tmp_path / "run", [[Step("idle", shell("true"), 1, outputs=[tmp_path / "nothing"])]]
        )
    assert not (tmp_path / "run" / ".done" / "idle.json").exists()


CHAINS = {
    "demo": [],
    "compare_fusions": [],
    "sweep_split": [],
    "scratch_experiments": ["data"],
    "make_teacher": ["--rehearsal", "--out", "{}/teacher"],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_holds_its_run_directory(tmp_path: Path, name: str) -> None:
    """A second one is told so, a folder of others is left alone; nothing is rendered or written
    before."""
    script, more = f"recipes/{name}.py", [word.format(tmp_path) for word in CHAINS[name]]
    with chain(tmp_path / "run"):
        second = recipe_runner.run(script, *more, "--run", tmp_path / "run")
    assert second.code == 2 and "is at work in it" in second.err and second.err.count("error:") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".done", ".lock"]
    others = tmp_path / "others"
    others.mkdir()
    (others / "results.json").write_text("mine")
    found = recipe_runner.run(script, *more, "--run", others)
    assert found.code == 2 and "nothing of others is touched: choose another --run" in found.err
    if name == "make_teacher":
        found = recipe_runner.run(script, "--rehearsal", "--out", others, "--run", tmp_path / "new")
        assert (
            found.code == 2
            and "give another --out" in found.err
            and not (tmp_path / "new").exists()
        )
    assert [path.name for path in others.iterdir()] == ["results.json"]


def lines_of_a_terminal(width: int, steps: list[Step], run: Path) -> tuple[list[str], list[str]]:
    """The lines that a terminal of this width got in all, and those that stay at the end."""
    rows = [(step.name, list(step.command), step.seconds) for step in steps]
    code = (
        "import pathlib\nfrom scd_sf.tools.steps import Step, run_steps\n"
        f"rows = {rows!r}\n"
        f"run_steps(pathlib.Path({str(run)!r}), [[Step(*row)] for row in rows])\n"
    )
    environ = {**os.environ, "COLUMNS": str(width), "LINES": "50", "TERM": "xterm"}
    environ["FORCE_COLOR"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout).replace("\r", "\n")
    seen = [line.rstrip() for line in text.split("\n") if line.strip()]
    return seen, [line for line in seen if "done in" in line]


@pytest.mark.parametrize("width", [34, 100])
def test_one_tidy_line_a_step_on_terminals(tmp_path: Path, width: int) -> None:
    """Long output stays in the log; no line is cut with dots, and live lines fit the terminal."""
    steps = [
        Step("clips", shell(f"echo step 3/7 {'x' * 300}; sleep 0.5"), 30),
        Step("stage2-scd", shell("echo step 12/165; sleep 1"), 200),
    ]
    seen, done = lines_of_a_terminal(width, steps, tmp_path / "run")
    assert len(done) == 2 and done[0].startswith("[1/2] clips") and "to go" in done[0]
    assert done[1].startswith("[2/2] stage2-scd  done in ") and "to go" not in done[1]
    assert not any("\u2026" in line or "xxx" in line for line in seen)
    live = [line for line in seen if "12/165" in line]
    assert live and all(len(line) < width for line in live)
    assert ("of about 3:20" in live[-1]) == (width == 100)


def test_without_a_terminal_a_step_is_a_line_and_a_long_one_gives_signs_of_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scd_sf.tools.steps.LIFE_SECONDS", 0.3)
    long = f"echo step 5/9 {'y' * 400}; sleep 1"
    run_steps(tmp_path, [[Step("a", shell("true"), 1)], [Step("long", shell(long), 60)]])
    first, a, *alive, last = capsys.readouterr().out.splitlines()
    assert first.startswith("2 steps, about 1:01 in all")
    assert re.fullmatch(r"\[1/2\] a     done in 0:\d\d, about 1:00 to go", a)
    counts = re.compile(r"\[2/2\] long  (      5/9|         )  0:\d\d of about 1:00")
    assert all(counts.fullmatch(line) for line in alive) and "5/9" in alive[-1]
    assert last.startswith("[2/2] long  done in 0:")
