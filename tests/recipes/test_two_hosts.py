"""Two hosts, rehearsed on this one: two torchrun launchers of one rank each that meet on the
loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import recipe_runner
import tiny_run
from tiny_run import Chain

from scd_sf.checkpoint import find
from scd_sf.tools.runs.curve import read_tail

STEPS, SAVE_EVERY = 24, 4
BOUND = 120.0  # seconds; a lost host was noticed within 10


def recipe(chain: Chain, run: Path) -> list[str]:
    """Stage 2 and its arguments."""
    train = f"train={{steps: {STEPS}, global_batch: 4, micro_batch: 2, save_every: {SAVE_EVERY}, validate_every: 12}}"
    arguments = [text for text in chain.stage2(run) if not text.startswith(("train=", "engine="))]
    return [
        "recipes/stage2_flow_matching.py",
        *arguments,
        train,
        "engine={backend: deepspeed, lr: 1e-2}",
    ]


def start(chain: Chain, run: Path, logs: Path) -> list[subprocess.Popen[bytes]]:
    """The command of docs/how_to/cluster.md once for every host; what each prints goes to ``logs``."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
    ]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", recipe_runner.free_port()]
    programs = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    logs.mkdir()
    hosts = []
    for rank in range(2):
        with (logs / f"host{rank}.txt").open("wb") as out:
            command = [*launcher, "--node_rank", str(rank), *recipe(chain, run)]
            hosts.append(
                subprocess.Popen(command, cwd=recipe_runner.ROOT, env=env, stdout=out, stderr=out)
            )
    return hosts


def finish(hosts: list[subprocess.Popen[bytes]], logs: Path) -> None:
    codes = [host.wait(300) for host in hosts]
    said = "\n".join(file.read_text()[-3000:] for file in sorted(logs.iterdir()))
    assert codes == [0, 0], said


def lose(
    host: int, hosts: list[subprocess.Popen[bytes]], run: Path, after: int, logs: Path
) -> None:
    """SIGKILL to one launcher and its rank after ``after`` steps; the other must end by itself, not
    with 0."""
    while read_tail(run / "metrics.jsonl").last < after:
        assert [process.poll() for process in hosts] == [None, None], (
            logs / "host0.txt"
        ).read_text()[-3000:]
        time.sleep(0.02)
    launcher = psutil.Process(hosts[host].pid)
    for process in (*launcher.children(recursive=True), launcher):
        process.kill()
    began = time.monotonic()
    assert hosts[1 - host].wait(BOUND) != 0
    print(f"host {1 - host} ended {time.monotonic() - began:.1f} s after host {host} was lost")
    hosts[host].wait()
    assert after <= read_tail(run / "metrics.jsonl").last < STEPS


@pytest.mark.slow
def test_a_lost_host_ends_the_other_and_the_same_commands_go_on(
    chain: Chain, tmp_path: Path
) -> None:
    """Host 1 is lost, then, after a resume, host 0 with rank 0; the metrics are those of the
    unbroken run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    unbroken = recipe_runner.run_ranks(*recipe(chain, whole), world=2)
    assert [result.code for result in unbroken] == [0, 0], unbroken[0].err
    lose(1, start(chain, run, tmp_path / "1"), run, 5, tmp_path / "1")
    lose(0, start(chain, run, tmp_path / "2"), run, 13, tmp_path / "2")
    finish(start(chain, run, tmp_path / "3"), tmp_path / "3")
    assert tiny_run.metrics(run) == tiny_run.metrics(whole)
    assert find(run).name == f"step_{STEPS:08d}"
