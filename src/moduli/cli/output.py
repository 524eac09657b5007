"""Where output goes: results to stdout (as text or as one JSON document), the rest to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let `main` treat it; rich would exit with status 1."""
        raise BrokenPipeError


class Output:
    """Two consoles and the choice between text and JSON.

    Args:
        as_json: print results as one JSON document and nothing else on stdout.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # Text is ours and may hold square brackets, so markup is off; numbers are not coloured.
        self.console = _Console(file=sys.stdout, highlight=False, markup=False)
        self.log = _Console(file=sys.stderr, highlight=False, markup=False)

    def note(self, line: str) -> None:
        """A line about what is going on."""
        self.log.print(line, style="dim", soft_wrap=True)

    def text(self, *parts: Any) -> None:
        """Part of a result, for people."""
        if not self.as_json:
            for part in parts:
                self.console.print(part)

    def data(self, value: Any) -> None:
        """The result, for machines."""
        if self.as_json:
            sys.stdout.write(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as null, which is what JSON has for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, text: int = 1) -> Table:
    """A plain table; the first `text` columns are text, the others numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < text else "right")
    for row in rows:
        made.add_row(*row)
    return made
