"""A plain list of prompts as training data: any number of rows, eight bytes of memory each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from scd_sf.data.prompt_files import PromptFile, PromptRow
from scd_sf.data.prompts import Prompt, is_encoded
from scd_sf.files import hash_json
from scd_sf.types import UserError


def is_list(path: Path) -> bool:
    """Whether ``prompts=`` names a list: a file, or a filter's or an extender's folder; not a
    directory of states."""
    return path.exists() and not is_encoded(path)


def read_prompt_list(path: Path, column: str = "prompt") -> list[Prompt]:
    """Every row, held-out ones too, for a directory of encoded prompts. UserError as
    :class:`PromptList`."""
    rows = _plain_rows(PromptFile(path, column))
    return [
        Prompt(row.uuid or f"p{number:06d}", row.prompt, row.held_out)
        for number, (_, row) in enumerate(rows)
    ]


class PromptList:
    """The rows of a list that training sees: all but those that are held out.

    The whole list is read and checked when it is opened. The numbers of rows never change, and
    :attr:`hash` (of the contents and the column) says which list it is. UserError: as PromptFile; a
    row that says more than a prompt.
    """

    def __init__(self, path: Path, column: str = "prompt") -> None:
        self._file = PromptFile(path, column)
        self.path = self._file.path
        self._offsets = array("q")
        self.held_out = 0
        for offset, row in _plain_rows(self._file):
            if row.held_out:
                self.held_out += 1
            else:
                self._offsets.append(offset)
        if not self._offsets:
            raise UserError(f"{self.path}: all prompts are held out; give some to train on")
        self.hash = hash_json([self._file.sha256, column])

    def __len__(self) -> int:
        return len(self._offsets)

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these rows, read anew. UserError where the file was changed meanwhile."""
        return [self._file.row(self._offsets[index]).prompt for index in indices]


def _plain_rows(file: PromptFile) -> Iterator[tuple[int, PromptRow]]:
    """(offset, row) of every row. UserError for one that says more than a prompt."""
    for number, (offset, row) in enumerate(file.rows(), 1):
        for name, is_set in (
            ("start", row.start),
            ("video", row.video),
            ("then", row.then),
            ("seed", row.seed is not None),
        ):
            if is_set:
                raise UserError(
                    f"{file.path}: prompt {number} has '{name}', but here a prompt is all: remove it"
                )
        yield offset, row
