"""Two hosts, rehearsed on this one: two torchrun launchers of one rank each that meet on the
loopback address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from tiny_run import Chain

from scd_sf.checkpoint import find
from scd_sf.tools.runs.curve import read_tail

STEPS, SAVE_EVERY = 24, 4
BOUND = 300.0  # seconds; a lost host was noticed within 10
# The recipe on a host that is lost: in the first step after so many, its launcher and its rank are killed.
LOST = """
import os, runpy, signal, sys
from pathlib import Path
from scd_sf.tools.runs.curve import read_tail
from scd_sf.train.engine import DeepSpeedEngine

after, metrics = int(sys.argv[1]), Path(sys.argv[2])
sys.argv = sys.argv[3:]
backward = DeepSpeedEngine.backward

def lost(*given, **more):
    if read_tail(metrics).last >= after:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*given, **more)

DeepSpeedEngine.backward = lost
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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


def start(
    chain: Chain, run: Path, logs: Path, lost: int = -1, after: int = 0
) -> list[subprocess.Popen[bytes]]:
    """The command of docs/how_to/cluster.md once for every host; what each prints goes to ``logs``.
    Host ``lost`` is lost after ``after`` steps."""
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
    script = logs / "lost.py"
    script.write_text(LOST)
    hosts = []
    for rank in range(2):
        words = [str(script), str(after), str(run / "metrics.jsonl")] if rank == lost else []
        with (logs / f"host{rank}.txt").open("wb") as out:
            command = [*launcher, "--node_rank", str(rank), *words, *recipe(chain, run)]
            hosts.append(
                subprocess.Popen(command, cwd=recipe_runner.ROOT, env=env, stdout=out, stderr=out)
            )
    return hosts


def finish(hosts: list[subprocess.Popen[bytes]], logs: Path) -> None:
    codes = [host.wait(300) for host in hosts]
    said = "\n".join(file.read_text()[-3000:] for file in sorted(logs.glob("*.txt")))
    assert codes == [0, 0], said


def lose(chain: Chain, run: Path, host: int, after: int, logs: Path) -> None:
    """SIGKILL to one launcher and its rank after ``after`` steps; the other must end by itself, not
    with 0."""
    hosts = start(chain, run, logs, host, after)
    killed = hosts[host].wait(300)
    assert killed == -signal.SIGKILL, (logs / f"host{host}.txt").read_text()[-3000:]
    began = time.monotonic()
    assert hosts[1 - host].wait(BOUND) != 0
    print(f"host {1 - host} ended {time.monotonic() - began:.1f} s after host {host} was lost")
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
    lose(chain, run, 1, 5, tmp_path / "1")
    lose(chain, run, 0, 13, tmp_path / "2")
    finish(start(chain, run, tmp_path / "3"), tmp_path / "3")
    assert tiny_run.metrics(run) == tiny_run.metrics(whole)
    assert find(run).name == f"step_{STEPS:08d}"
