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
    """One part: its tables (columns, rows) and the notes below them."""

    title: str
    tables: list[tuple[list[str], list[list[str]]]]
    notes: list[str]


def sheets(document: Figures) -> Iterator[Sheet]:
    """The summary, then the parts in order."""
    yield in_short(document)
    for number, part in document["parts"].items():
        lines = [line for row in part["rows"].values() for line in row.get("lines", [])]
        # lines of one kind have the same columns
        groups: dict[tuple[str, ...], list[list[str]]] = {}
        for line in lines:
            groups.setdefault(tuple(line), []).append([_cell(value) for value in line.values()])
        size = ", AT TOY SIZE" if _toy(document) else ""
        title = f"Part {number}: {part['title']}{size} ({part['seconds']:.0f} s, budget {part['budget_seconds']:.0f} s)"
        yield Sheet(
            title, [(list(columns), rows) for columns, rows in groups.items()], list(_notes(part))
        )


def in_short(document: Figures) -> Sheet:
    """How many rows were good, failed or were left out, and the best speeds."""
    rows, totals = [], [0, 0, 0]
    for number, part in document["parts"].items():
        counts = [len(part["rows"]), failures(part), len(part["left_out"])]
        counts[0] -= sum("error" in row for row in part["rows"].values())
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append([f"{number}: {part['title']}", *map(str, counts)])
    good_count, failed_count, skipped_count = totals
    if failed_count:
        notes = [
            f"{failed_count} FAILED: see the words FAILED and NOT RUN below. The same command tries them again."
        ]
    else:
        notes = [f"Nothing failed: {good_count} rows are within their limits, or have none."]
    if skipped_count:
        notes.append(
            f"{skipped_count} left out, as the budget was spent: the same command goes on with them."
        )
    if _toy(document):
        notes.append("TOY SIZE ON A CPU: this tries the code. It says nothing about a GPU.")
    else:
        notes += _fastest(document["parts"].get("2", {"rows": {}}))
    return Sheet("In short", [(["part", "good", "failed", "left out"], rows)], notes)


def failures(part: Figures) -> int:
    """Rows of a part that failed or were beyond a limit; one for a part that could not begin."""
    rows = sum("error" in row for row in part["rows"].values())
    return rows + 1 if part.get("error") else rows


def _toy(document: Figures) -> bool:
    return bool((document.get("machine") or {}).get("toy"))


def _fastest(part: Figures) -> Iterator[str]:
    """One sentence for each model of part 2: its best speed at 4 steps, with the VAE."""
    best_lines: dict[str, Figures] = {}
    for row in part["rows"].values():
        for line in row.get("lines", []):
            if (
                line["steps"] == 4
                and line["FPS dit+vae"]
                > best_lines.get(line["model"], {"FPS dit+vae": 0})["FPS dit+vae"]
            ):
                best_lines[line["model"]] = line
    for model, line in best_lines.items():
        first_frame = (
            f"first frame after {_cell(line['with vae'])} s, {_cell(line['peak GiB'])} GiB"
        )
        yield f"{model}: {_cell(line['FPS dit+vae'])} frames per second at 4 steps, {line['run']}; {first_frame}"


def _notes(part: Figures) -> Iterator[str]:
    if part.get("error"):
        yield f"NOT RUN: {part['error']}: {_last_line(part)}"
    for name, row in part["rows"].items():
        if "error" in row:
            yield f"FAILED: {name}: {row['error']}"
    for name in part["left_out"]:
        yield f"left out, as the budget was spent: {name}"


def _last_line(part: Figures) -> str:
    return next(
        (line for line in reversed(part.get("last_lines", [])) if line.strip()), "no output"
    )


def _cell(value: object) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return printable(str(value))


def heading(document: Figures) -> str:
    """Machine, versions, revision and date in one line."""
    machine = document["machine"]
    if machine is None:
        return "nothing has run yet"
    facts = [
        machine["device"],
        f"driver {machine['driver']}" if machine["driver"] else "",
        f"{machine['memory_gib']} GiB",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    warnings = "".join(
        f"; OLDER THAN TESTED: {text}" for text in machine.get("older_than_tested", [])
    )
    line = f"{', '.join(fact for fact in facts if fact)}; {versions}{warnings}"
    return f"{line}; revision {machine['revision']}; {machine['date']}"


def tables(document: Figures) -> Iterator[Table | str]:
    """The document as lines and tables for a terminal."""
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


def gpu_markdown(document: Figures) -> str:
    """The document as Markdown."""
    blocks = [heading(document)]
    for sheet in sheets(document):
        blocks.append(f"## {sheet.title}")
        for columns, rows in sheet.tables:
            lines = [columns, ["---"] * len(columns), *rows]
            blocks.append(
                "\n".join(
                    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                    for line in lines
                )
            )
        if sheet.notes:
            blocks.append("\n".join(f"- {note}" for note in sheet.notes))
    return "\n\n".join(blocks) + "\n"
