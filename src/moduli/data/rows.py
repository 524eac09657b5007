"""From columns of a file to checked rows: every row has its inputs, its target and a domain.

Data that cannot be trained on is refused here with the rows to look at, before any model is
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moduli.data.cells import Cell, nothing
from moduli.data.kinds import DataKind
from moduli.data.task import DataOptions
from moduli.errors import DataError, nearest

_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """Columns as they were read.

    Attributes:
        source: what to call it in messages (a path, or a data set and its split).
        columns: values by column, all of one length.
        split: which split the user says this is; None where moduli is to split.
        class_names: by column, names of its integers, where the data brings them.
        folder: what paths in the table are relative to.
    """

    source: str
    columns: dict[str, list[Any]]
    split: str | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Attributes:
        values: by column of the task.
        content: the inputs as they count for repetition, see `DataKind.content`.
        domain: where it is from.
        group: its document.
        split: None where moduli decides it.
    """

    values: dict[str, Any]
    content: str
    domain: str = "all"
    group: str | None = None
    split: str | None = None


def checked_rows(
    tables: Sequence[Table], options: DataOptions, kind: DataKind
) -> tuple[list[Row], tuple[str, ...], list[str]]:
    """Rows of all tables, the names of the labels, and notes on what was left out.

    Raises:
        DataError: a column is missing; there is no row; an input, target or domain is empty or
            is not what its column should hold; the labels are not classes, or all the same.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for table in tables:
        rows += _rows_of(table, options, kind, notes)
    if kind.target is None:
        return rows, (), notes
    target, column = kind.target.name, getattr(options, kind.target.option)
    given = {table.class_names.get(column) for table in tables}
    source = tables[0].source
    if len(given) > 1:
        raise DataError(f"The parts of {source} do not agree on the names of their classes.")
    raw = [row.values[target] for row in rows]
    encoded, names = kind.encode(raw, given.pop(), source, column)
    for row, value in zip(rows, encoded, strict=True):
        row.values[target] = value
    return rows, names, notes


def _column(table: Table, name: str, option: str, kind: DataKind) -> list[Any]:
    """One column, or an error that names those that exist and the option to set."""
    if name in table.columns:
        return table.columns[name]
    known = ", ".join(repr(c) for c in table.columns) or "none"
    hint = nearest(name, table.columns)
    hint = f" {hint}" if hint.startswith("Did") else ""
    other = ""
    if kind.target is not None and option == "label_column" and "text" in kind.columns[0].name:
        other = " To learn texts without labels, give kind='language-modeling'."
    raise DataError(
        f"{table.source} has no column {name!r}.{hint} Its columns: {known}. "
        f"The option {option} says which one to take.{other}"
    )


def _rows_of(table: Table, options: DataOptions, kind: DataKind, notes: list[str]) -> list[Row]:
    used = {cell.name: getattr(options, cell.option) for cell in kind.columns}
    cells = [cell for cell in kind.columns if used[cell.name] is not None]
    raw = {cell.name: _column(table, used[cell.name], cell.option, kind) for cell in cells}
    size = len(raw[cells[0].name])
    if not size:
        raise DataError(f"{table.source} has no rows.")

    def optional(name: str | None, option: str) -> list[Any]:
        return [None] * size if name is None else _column(table, name, option, kind)

    domains = optional(options.domain_column, "domain_column")
    groups = optional(options.group_column, "group_column")

    read = {cell.name: _read(cell, raw[cell.name], used[cell.name], table) for cell in cells}
    # each kind of hole is its own message: the cure differs
    holes = {
        f"no {cell.what} (column {used[cell.name]!r})": [
            cell.empty(value) for value in raw[cell.name]
        ]
        for cell in cells
    }
    kept = _without(holes, table.source, size, options, notes, kind)
    if options.domain_column is not None and (where := [i for i in kept if nothing(domains[i])]):
        raise DataError(
            f"{table.source}: {len(where)} of {size} rows have no domain (column "
            f"{options.domain_column!r}): {_places(where)}."
        )
    rows = []
    for i in kept:
        values = {cell.name: read[cell.name][i] for cell in cells}
        rows.append(
            Row(
                values=values,
                content=kind.content(values),
                domain="all" if options.domain_column is None else str(domains[i]).strip(),
                # a row without a document is a document of its own
                group=None if nothing(groups[i]) else str(groups[i]).strip(),
                split=table.split,
            )
        )
    _same_lengths(rows, kept, table, used)
    return rows


def _read(cell: Cell, values: list[Any], column: str, table: Table) -> list[Any]:
    found = []
    for number, value in enumerate(values, start=1):
        try:
            found.append(None if cell.empty(value) else cell.read(value, table.folder))
        except ValueError as error:
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
            raise DataError(
                f"{table.source}: column {column!r} holds {type(value).__name__} at row {number} "
                f"({shown}), {error}."
            ) from None
    return found


def _same_lengths(
    rows: list[Row], kept: list[int], table: Table, used: Mapping[str, str | None]
) -> None:
    """As many tags as words, where there are both."""
    if not {"tokens", "tags"} <= set(used):
        return
    for row, i in zip(rows, kept, strict=True):
        words, tags = len(row.values["tokens"]), len(row.values["tags"])
        if words != tags:
            raise DataError(
                f"{table.source}: row {i + 1} has {words} words (column {used['tokens']!r}) and "
                f"{tags} tags (column {used['tags']!r}); every word needs one tag."
            )


def _without(
    holes: dict[str, list[bool]],
    source: str,
    size: int,
    options: DataOptions,
    notes: list[str],
    kind: DataKind,
) -> list[int]:
    """Indices of rows without holes; refused, or left out with a note, as the user chose."""
    kept = list(range(size))
    for what, flags in holes.items():
        where = [i for i in range(size) if flags[i]]
        if not where:
            continue
        found = f"{len(where)} of {size} rows with {what}: {_places(where)}."
        if not options.drop_empty:
            raise DataError(
                f"{source}: {found} Fill them in, or leave them out with drop_empty=True."
            )
        notes.append(f"{source}: left out {found}")
        kept = [i for i in kept if not flags[i]]
    if not kept:
        needed = " and ".join(f"a {cell.what}" for cell in (kind.inputs[0], kind.columns[-1]))
        needed = f"both {needed}" if kind.target is not None else f"a {kind.inputs[0].what}"
        raise DataError(f"{source}: none of its {size} rows has {needed}.")
    return kept


def _places(where: Sequence[int]) -> str:
    """Rows as people count them: from 1, without a header."""
    shown = ", ".join(str(index + 1) for index in where[:_SHOWN])
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    return f"row {shown}" if len(where) == 1 else f"rows {shown}{more}"
