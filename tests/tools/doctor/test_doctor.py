"""`scd doctor`: every check says ok, warn or fail with a remedy, and none of them can take the
report down."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from scd_sf import cli
from scd_sf.cli import app
from scd_sf.tools.doctor import checks
from scd_sf.tools.doctor.checks import FAIL, OK, WARN, Finding


def doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


def test_every_check_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    code, out = doctor("--json", "--quick")
    assert "secret" not in out
    findings = {finding["name"]: finding for finding in json.loads(out)}
    wanted = {
        "torch",
        "deepspeed",
        "diffusers",
        "python",
        "disk",
        "memory",
        "C++ compiler",
        "torch build",
        "attention",
        "video",
        "open files",
        "locked memory",
        "disk, temporary",
        "disk, Hugging Face",
        "HF_TOKEN",
    }
    assert wanted <= set(findings) and not any(name.startswith("all-reduce") for name in findings)
    assert code == int(any(finding["status"] == "fail" for finding in findings.values()))
    assert all(finding["remedy"] for finding in findings.values() if finding["status"] != "ok")
    assert not any("\n" in finding["remedy"] for finding in findings.values())
    assert (
        "libx264 written and read" in findings["video"]["found"]
        and "math" in findings["attention"]["found"]
    )


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_exit_code_and_remedy(monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    monkeypatch.setattr(
        cli,
        "examine_machine",
        lambda *, quick: [Finding("torch", status, f"quick={quick}", "pip install x")],
    )
    assert doctor()[0] == doctor("--json", "--quick")[0] == code
    assert (
        "pip install x" in doctor()[1]
        and "quick=False" in doctor()[1]
        and "quick=True" in doctor("--quick")[1]
    )


def test_a_check_that_breaks_is_a_failure_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("no such device\nat all")

    monkeypatch.setattr(checks, "CHECKS", {"disk": broken, "python": checks.python})
    first, second = checks.examine_machine(quick=True)
    assert (first.name, first.status, first.found) == (
        "disk",
        FAIL,
        "OSError: no such device",
    ) and first.remedy
    assert second.status == OK


@pytest.mark.parametrize(
    ("installed", "status"), [(None, "fail"), ("0.19.7", "fail"), ("0.19.8", "ok"), ("1.0", "ok")]
)
def test_check_requirement(installed: str | None, status: str) -> None:
    finding = checks.check_requirement(Requirement("deepspeed>=0.19.8"), installed)
    assert finding.status == status
    assert ("deepspeed>=0.19.8" in finding.remedy) == (status == "fail")


def test_the_slow_conv3d_is_torch_2_9_with_an_old_cudnn() -> None:
    slow = {("2.9.0", 91002), ("2.9.1+cu128", 91499)}
    fine = {("2.9.1", 91500), ("2.8.0", 91002), ("2.10.0", 91002), ("2.14.1", 91002), ("2.90.0", 0)}
    assert all(checks.conv3d_is_slow(*pair) for pair in slow)
    assert not any(checks.conv3d_is_slow(*pair) for pair in fine)


def usage(total_gib: float, free_gib: float) -> Callable[[object], object]:
    class Usage:
        total, free = int(total_gib * 2**30), int(free_gib * 2**30)

    return lambda _: Usage


def test_little_of_everything_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(0.0625, 0.5))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    names = {
        f.name: f
        for check in (checks.memory, checks.limits, checks.disks, checks.compiler)
        for f in check()
    }
    for name in (
        "shared memory",
        "open files",
        "disk",
        "disk, temporary",
        "disk, Hugging Face",
        "C++ compiler",
    ):
        assert names[name].status != OK and names[name].remedy, name
    assert (
        "--shm-size" in names["shared memory"].remedy and "0.1 GiB" in names["shared memory"].found
    )


@pytest.mark.slow
def test_all_reduce_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement; a rank that fails with its error; and a time limit that is kept."""
    (finding,) = checks.all_reduce()
    assert finding.status == OK and "2 ranks agree" in finding.found
    (finding,) = checks.all_reduce(seconds=0.3)
    assert finding.status == FAIL and "still wait after 0 s" in finding.found and finding.remedy
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (finding,) = checks.all_reduce()
    assert (
        finding.status == FAIL and "rank " in finding.found and "no-such-interface" in finding.found
    )
