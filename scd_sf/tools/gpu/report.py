"""The document of `make gpu` for people: tables for a terminal, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from scd_sf.tools.gpu.parts import Figures
from scd_sf.types import as_cell, printable

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Sheet:
    """One part: its tables (columns, rows), and what is to be said below them."""

    title: str
    tables: list[tuple[list[str], list[list[str]]]]
    notes: list[str]


def sheets(document: Figures) -> Iterator[Sheet]:
    """The parts in order."""
    for number, part in document["parts"].items():
        lines = [line for row in part["rows"].values() for line in row.get("lines", [])]
        groups: dict[tuple[str, ...], list[list[str]]] = {}  # lines of one kind have the same columns
        for line in lines:
            groups.setdefault(tuple(line), []).append([_cell(value) for value in line.values()])
        title = f"Part {number}: {part['title']} ({part['seconds']:.0f} s, budget {part['budget_seconds']:.0f} s)"
        yield Sheet(title, [(list(columns), rows) for columns, rows in groups.items()], list(_notes(part)))


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
        yield ""
        yield sheet.title
        for columns, rows in sheet.tables:
            table = Table(box=None, pad_edge=False)
            for column in columns:
                table.add_column(as_cell(column))
            for row in rows:
                table.add_row(*(as_cell(cell) for cell in row))
            yield table
        yield from sheet.notes


def markdown(document: Figures) -> str:
    """The same, for a page."""
    blocks = [heading(document)]
    for sheet in sheets(document):
        blocks.append(f"## {sheet.title}")
        for columns, rows in sheet.tables:
            lines = [columns, ["---"] * len(columns), *rows]
            blocks.append(
                "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            )
        if sheet.notes:
            blocks.append("\n".join(f"- {note}" for note in sheet.notes))
    return "\n\n".join(blocks) + "\n"
