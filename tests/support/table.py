"""The support table: results of the checks as JSON, and as a table of the documentation."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = Path(__file__).with_name("expected.json")
PAGE = ROOT / "docs/guide/support.md"
START, END = "<!-- made by `make support`: start -->", "<!-- end -->"

Cell = dict[str, str]  # name of the check -> "yes", "no: reason" or "n/a: reason"
Results = dict[str, dict[str, Cell]]  # family -> method -> cell


def read() -> Results:
    """What the tests expect."""
    found: Results = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


def write(results: Results) -> None:
    """Store results, one line per cell, and put the table made from them into its page."""
    families = [
        f"{json.dumps(family)}: {{\n"
        + ",\n".join(f"  {json.dumps(m)}: {json.dumps(cell)}" for m, cell in row.items())
        + "\n}"
        for family, row in results.items()
    ]
    EXPECTED.write_text("{\n" + ",\n".join(families) + "\n}\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_table(page: str, results: Results) -> str:
    """The page with its generated part replaced."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{render(results)}\n\n{END}{after}"


def render(results: Results) -> str:
    """Table and footnotes; cells say what does not hold, everything else does."""
    methods = list(dict.fromkeys(method for row in results.values() for method in row))
    notes: list[str] = []
    lines = [
        f"| family | {' | '.join(f'`{m}`' for m in methods)} |",
        f"|---|{'---|' * len(methods)}",
    ]
    for family, row in results.items():
        cells = [_cell(row.get(method, {}), notes) for method in methods]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    numbered = [f"{i}. {note}" for i, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *numbered])


def _cell(cell: Cell, notes: list[str]) -> str:
    """A mark, and the numbers of its footnotes."""
    if not cell:
        return ""
    refused = all(value.startswith("no") for value in cell.values())
    marks = []
    for check, value in cell.items():
        status, _, reason = value.partition(": ")
        if status == "yes" or reason == "it does not generate":
            continue
        note = f"Refused: {reason}." if refused else f"{check[0].upper()}{check[1:]}: {reason}."
        if note not in notes:
            notes.append(note)
        marks.append(str(notes.index(note) + 1))
    numbers = f" <sup>{', '.join(marks)}</sup>" if marks else ""
    return f"{'–' if refused else '✓'}{numbers}"
