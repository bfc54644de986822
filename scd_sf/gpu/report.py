"""The document of `make gpu` for people: tables for a terminal, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from scd_sf.gpu.parts import Figures
from scd_sf.types import as_cell, printable

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Sheet:
    """One part: its table, and what is to be said below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def sheets(document: Figures) -> Iterator[Sheet]:
    """The parts in order."""
    for number, part in document["parts"].items():
        lines = [line for row in part["rows"].values() for line in row.get("lines", [])]
        columns = list(dict.fromkeys(column for line in lines for column in line))
        rows = [[_cell(line.get(column)) for column in columns] for line in lines]
        title = f"Part {number}: {part['title']} ({part['seconds']:.0f} s, budget {part['budget_seconds']:.0f} s)"
        yield Sheet(title, columns, rows, list(_notes(part)))


def _notes(part: Figures) -> Iterator[str]:
    if part.get("error"):
        yield f"NOT RUN: {part['error']}: {_last(part)}"
    for name, row in part["rows"].items():
        if "error" in row:
            yield f"FAILED: {name}: {row['error']}"
    for name in part["left_out"]:
        yield f"left out, as the budget was spent: {name}"


def _last(part: Figures) -> str:
    return next((line for line in reversed(part.get("last_lines", [])) if line.strip()), "no output")


def _cell(value: object) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return printable(str(value))


def heading(document: Figures) -> str:
    """The machine in one line."""
    machine = document["machine"]
    if machine is None:
        return "nothing has run yet"
    facts = [
        machine["device"],
        f"driver {machine['driver']}" if machine["driver"] else "",
        f"{machine['memory_gib']} GiB",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{', '.join(fact for fact in facts if fact)}; {versions}; revision {machine['revision']}; {machine['date']}"


def tables(document: Figures) -> Iterator[Table | str]:
    """For a terminal."""
    yield heading(document)
    for sheet in sheets(document):
        table = Table(title=as_cell(sheet.title), title_justify="left")
        for column in sheet.columns:
            table.add_column(as_cell(column))
        for row in sheet.rows:
            table.add_row(*(as_cell(cell) for cell in row))
        yield table if sheet.rows else sheet.title
        yield from sheet.notes


def markdown(document: Figures) -> str:
    """The same, for a page."""
    blocks = [heading(document)]
    for sheet in sheets(document):
        blocks.append(f"## {sheet.title}")
        if sheet.rows:
            lines = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
            blocks.append(
                "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            )
        if sheet.notes:
            blocks.append("\n".join(f"- {note}" for note in sheet.notes))
    return "\n\n".join(blocks) + "\n"
