"""The Slurm files with a fake Slurm: ranks get their places, signals reach them, and only exit code
75 is requeued."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import recipe_runner

SLURM = recipe_runner.ROOT / "recipes" / "slurm"
# The fakes write what they were asked for into the folder they are called in.
FAKES = {
    "srun": 'echo "$*" > srun.txt\nwhile [ "${1#--}" != "$1" ]; do shift; done\n'
    'SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 exec "$@"',
    "scontrol": 'echo "$*" >> scontrol.txt\nif [ "$1" = show ]; then echo first; echo second; fi',
    "squeue": 'echo "$FAKE_STATE"',
    "python": 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE" > place.txt\n'
    'echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*" > ran.txt\n'
    'if [ -n "$FAKE_CODE" ]; then exit "$FAKE_CODE"; fi\n'
    "trap 'exit 75' USR1\ntouch ready\nwhile :; do sleep 0.05; done",
}


def a_cluster(root: Path) -> Path:
    """A repository as a job sees it: the Slurm files, an environment, and the fakes first on
    PATH."""
    shutil.copytree(SLURM, root / "recipes" / "slurm")
    (root / "bin").mkdir()
    for name, body in FAKES.items():
        (root / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (root / "bin" / name).chmod(0o755)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "activate").write_text("")
    return root


def submit(
    root: Path, stage: str, *arguments: str, code: str = "", state: str = "RUNNING"
) -> subprocess.Popen[bytes]:
    """``sbatch recipes/slurm/STAGE.sbatch ARGUMENTS``: Slurm runs a copy of the script, somewhere
    else."""
    job = root / "spool"
    job.mkdir(exist_ok=True)
    copy = shutil.copyfile(root / "recipes" / "slurm" / f"{stage}.sbatch", job / "slurm_script")
    slurm = {
        "SLURM_JOB_ID": "30007",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
    }
    fake = {"FAKE_CODE": code, "FAKE_STATE": state}
    env = {**os.environ, **slurm, **fake, "PATH": f"{root}/bin{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(["bash", copy, *arguments], cwd=job, env=env)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_headers_and_syntax(stage: str) -> None:
    text = (SLURM / f"{stage}.sbatch").read_text()
    for line in (
        "--requeue",
        "--signal=B:USR1@600",
        "--open-mode=append",
        "--nodes=",
        "--gpus-per-node=",
    ):
        assert f"#SBATCH {line}" in text
    for file in SLURM.iterdir():
        subprocess.run(["bash", "-n", file], check=True)


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        ("75", "RUNNING", True),
        ("75", "", True),
        ("75", "COMPLETING", False),
        ("0", "RUNNING", False),
        ("1", "RUNNING", False),
        ("2", "RUNNING", False),
        ("137", "RUNNING", False),
        ("143", "RUNNING", False),
    ],
)
def test_only_75_is_requeued_and_not_when_the_job_was_cancelled(
    tmp_path: Path, code: str, state: str, requeued: bool
) -> None:
    root = a_cluster(tmp_path)
    job = submit(root, "stage2", "run.dir=runs/x y", "train.steps=5", code=code, state=state)
    assert job.wait(30) == int(code)
    assert ("requeue 30007" in (root / "scontrol.txt").read_text()) == requeued
    ran = (root / "ran.txt").read_text()
    assert (root / "place.txt").read_text() == "9 16 1 8\n"
    assert ran.startswith(
        "first 30007 4 -u recipes/stage2_flow_matching.py --config recipes/configs/stage2_wan_1.3b.yaml"
    )
    assert ran.endswith("run.dir=runs/x y train.steps=5\n")
    assert "--kill-on-bad-exit=0 --wait=120 --cpus-per-task=4" in (root / "srun.txt").read_text()


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_ranks(tmp_path: Path, sent: signal.Signals) -> None:
    root = a_cluster(tmp_path)
    job = submit(root, "stage3")
    deadline = time.monotonic() + 30
    while not (root / "ready").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(sent)
    assert job.wait(30) == 75
    assert "requeue 30007" in (root / "scontrol.txt").read_text()
    assert "recipes/stage3_self_forcing.py" in (root / "ran.txt").read_text()
