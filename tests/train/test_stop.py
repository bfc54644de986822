"""Requests to a running job, its pulse, and naming the rank that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scd_sf.distributed import Ranks
from scd_sf.train.stop import Control, Request

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    for name in ("save", "stop"):
        (tmp_path / name).touch()  # left over from an earlier job
    listening = Control(tmp_path, ALONE, interval=0.05)
    listening.start(3, total=10)
    yield listening
    listening.close()


def test_files_ask(control: Control) -> None:
    assert control.request() is Request.NONE
    (control.dir / "save").touch()
    assert control.request() is Request.SAVE
    control.fulfilled()
    assert control.request() is Request.NONE
    (control.dir / "stop").touch()
    assert control.request() is Request.STOP and control.reason.endswith("stop")
    (control.dir / "save").touch()  # while that is carried out: it is for the next step
    control.fulfilled()
    assert not (control.dir / "stop").exists()
    assert control.request() is Request.STOP and (control.dir / "save").exists()
    control.fulfilled()
    assert not (control.dir / "save").exists()


def test_only_what_touch_makes_is_a_request(tmp_path: Path) -> None:
    """Files of others that are called so, folders and links are neither obeyed nor removed."""
    (tmp_path / "save").write_text("my notes")
    (tmp_path / "empty").touch()
    (tmp_path / "stop").symlink_to(tmp_path / "empty")
    control = Control(tmp_path, ALONE)
    control.start(0, total=1)
    assert control.request() is Request.NONE
    control.fulfilled()
    control.close()
    assert (tmp_path / "save").read_text() == "my notes" and (tmp_path / "stop").is_symlink()
    (tmp_path / "stop").unlink()
    (tmp_path / "stop").mkdir()
    assert control.request() is Request.NONE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_ask_to_stop(control: Control, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    assert control.request() is Request.STOP and control.reason == number.name
    control.say("interrupted", control.reason)
    assert json.loads((control.dir / "status.json").read_text())["reason"] == number.name


def test_a_second_ctrl_c_ends_at_once_and_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    control = Control(tmp_path, ALONE)
    control.start(0, total=1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    control.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_heartbeat_goes_on_between_steps(control: Control) -> None:
    file = control.dir / "heartbeat" / "rank_00000.json"
    first = json.loads(file.read_text())
    assert (first["step"], first["pid"]) == (3, os.getpid())
    until = time.monotonic() + 10
    while json.loads(file.read_text())["time"] <= first["time"] and time.monotonic() < until:
        time.sleep(0.05)
    later = json.loads(file.read_text())
    assert later["time"] > first["time"] and later["step"] == 3


def test_stacks_on_demand(control: Control) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_stacks_on_demand" in (control.dir / "heartbeat" / "rank_00000.stacks").read_text()


def test_blames_who_is_gone_and_nobody_else(tmp_path: Path) -> None:
    control = Control(tmp_path, Ranks(0, 2, 0, torch.device("cpu")))
    (tmp_path / "heartbeat").mkdir()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = Control(tmp_path, Ranks(1, 2, 1, torch.device("cpu")))
    control.beat(7)
    other.beat(6)
    file = tmp_path / "heartbeat" / "rank_00001.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": child.pid}))
    assert control.blame(RuntimeError("shapes differ"), patience=0.0) is None
    child.kill()
    # a zombie by now: nobody has waited for it
    error = control.blame(RuntimeError("Connection closed by peer\nmore"))
    assert (
        error is not None
        and f"rank 1 (process {child.pid}" in str(error)
        and "last seen at step 6" in str(error)
    )
    assert "Connection closed by peer" in str(error) and "run the same command again" in str(error)
    child.wait()
    elsewhere = {"time": time.time() - 1000, "step": 6, "pid": 1, "host": "another"}
    file.write_text(json.dumps(elsewhere))
    assert "on another) is gone" in str(control.blame(RuntimeError("timeout"), patience=0.0))
    for harmless in (
        {**elsewhere, "time": time.time()},
        {},
        [1],
        {**elsewhere, "time": "now"},
        {"pid": 2**70},
    ):
        file.write_text(json.dumps(harmless))
        assert control.blame(RuntimeError("timeout"), patience=0.0) is None
