"""All checks in the order in which a broken installation should be repaired; none can take the report down."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from scd_sf.tools.doctor import machine, packages, probes
from scd_sf.tools.doctor.finding import FAIL, OK, WARN, Finding

Check = Callable[[], list[Finding]]
CHECKS: dict[str, Check] = {
    "python": packages.python,
    "packages": packages.packages,
    "torch build": machine.torch_build,
    "cuda": machine.devices,
    "attention": probes.attention,
    "video": probes.video,
    "C++ compiler": machine.compiler,
    "threads": machine.threads,
    "memory": machine.memory,
    "limits": machine.limits,
    "disk": machine.disks,
    "tokens": machine.tokens,
    "extras": packages.extras,
}
SLOW_CHECKS: dict[str, Check] = {"all-reduce": probes.all_reduce}
_STYLE = {OK: "green", WARN: "yellow", FAIL: "bold red"}


def examine(*, quick: bool) -> list[Finding]:
    """Every check; ``quick`` leaves out those that start processes."""
    checks = CHECKS if quick else {**CHECKS, **SLOW_CHECKS}
    return [finding for name, check in checks.items() for finding in guarded(name, check)]


def guarded(name: str, check: Check) -> list[Finding]:
    """A check's findings; an exception in it is a failure of that check, with its text."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001
        first = (str(error).strip() or "no message").splitlines()[0]
        return [Finding(name, FAIL, f"{type(error).__name__}: {first}", "the check itself broke: repair what it names")]


def as_table(findings: list[Finding]) -> Table:
    """The report for a terminal."""
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        status = Text(finding.status, _STYLE[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.found), Text(finding.remedy))
    return table
