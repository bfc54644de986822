"""Run a Python file as if some packages were not installed.

python tests/tools/gpu/hidden.py av,scipy FILE.py [arguments ..]
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


class Without:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            None
            if name.partition(".")[0] in self.hidden
            else self.finder.find_spec(name, path, target)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


hidden, file, *arguments = sys.argv[1:]
sys.meta_path[:] = [Without(finder, set(hidden.split(","))) for finder in sys.meta_path]
sys.argv = [file, *arguments]
runpy.run_path(file, run_name="__main__")
