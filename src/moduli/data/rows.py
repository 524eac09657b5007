"""From columns of a file to checked rows: every row has a text, a class and a domain.

Data that cannot be trained on is refused here with the rows to look at, before any model is
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moduli.data.task import DataOptions
from moduli.errors import DataError, nearest

_SHOWN = 5
_MANY_CLASSES = 20


@dataclass(frozen=True)
class Table:
    """Columns as they were read.

    Attributes:
        source: what to call it in messages (a path, or a data set and its split).
        columns: values by column, all of one length.
        split: which split the user says this is; None where moduli is to split.
        class_names: names of the integers in the label column, where the data brings them.
    """

    source: str
    columns: dict[str, list[Any]]
    split: str | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `split` is None where moduli decides it; `group` is its document."""

    text: str
    label: int
    pair: str | None = None
    domain: str = "all"
    group: str | None = None
    split: str | None = None


def checked_rows(
    tables: Sequence[Table], options: DataOptions
) -> tuple[list[Row], tuple[str, ...], list[str]]:
    """Rows of all tables, the names of the classes, and notes on what was left out.

    Raises:
        DataError: a column is missing; there is no row; a text, label or domain is empty; the
            labels are not classes, or all the same.
    """
    raw: list[tuple[Row, Any]] = []
    notes: list[str] = []
    for table in tables:
        raw += _rows_of(table, options, notes)
    labels, names = _classes([label for _, label in raw], tables, options)
    rows = [
        Row(row.text, label, row.pair, row.domain, row.group, row.split)
        for (row, _), label in zip(raw, labels, strict=True)
    ]
    return rows, names, notes


def _column(table: Table, name: str, option: str) -> list[Any]:
    """One column, or an error that names those that exist and the option to set."""
    if name in table.columns:
        return table.columns[name]
    known = ", ".join(repr(c) for c in table.columns) or "none"
    hint = nearest(name, table.columns)
    hint = f" {hint}" if hint.startswith("Did") else ""
    raise DataError(
        f"{table.source} has no column {name!r}.{hint} Its columns: {known}. "
        f"The option {option} says which one to take."
    )


def _rows_of(table: Table, options: DataOptions, notes: list[str]) -> list[tuple[Row, Any]]:
    texts = _column(table, options.text_column, "text_column")
    labels = [_label(v) for v in _column(table, options.label_column, "label_column")]
    size = len(texts)
    if not size:
        raise DataError(f"{table.source} has no rows.")

    def optional(name: str | None, option: str) -> list[Any]:
        return [None] * size if name is None else _column(table, name, option)

    pairs = optional(options.text_pair_column, "text_pair_column")
    domains = optional(options.domain_column, "domain_column")
    groups = optional(options.group_column, "group_column")

    for name, values in ((options.text_column, texts), (options.text_pair_column, pairs)):
        for index, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{table.source}: column {name!r} holds {type(value).__name__} at row "
                    f"{index + 1} ({value!r}), not text."
                )
    # each kind of hole is its own message: the cure differs
    holes = {
        f"no text (column {options.text_column!r})": [_hole(value) for value in texts],
        f"no label (column {options.label_column!r})": [value is None for value in labels],
    }
    if options.text_pair_column is not None:
        holes[f"no text (column {options.text_pair_column!r})"] = [_hole(v) for v in pairs]
    kept = _without(holes, table.source, size, options, notes)
    if options.domain_column is not None and (where := [i for i in kept if _hole(domains[i])]):
        raise DataError(
            f"{table.source}: {len(where)} of {size} rows have no domain (column "
            f"{options.domain_column!r}): {_places(where)}."
        )
    return [
        (
            Row(
                text=texts[i],
                label=-1,
                pair=pairs[i],
                domain="all" if options.domain_column is None else str(domains[i]).strip(),
                # a row without a document is a document of its own
                group=None if _hole(groups[i]) else str(groups[i]).strip(),
                split=table.split,
            ),
            labels[i],
        )
        for i in kept
    ]


def _without(
    holes: dict[str, list[bool]], source: str, size: int, options: DataOptions, notes: list[str]
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
        raise DataError(f"{source}: none of its {size} rows has both a text and a label.")
    return kept


def _hole(value: Any) -> bool:
    """Nothing in this cell: None, NaN or white space."""
    return value is None or value != value or not str(value).strip()


def _places(where: Sequence[int]) -> str:
    """Rows as people count them: from 1, without a header."""
    shown = ", ".join(str(index + 1) for index in where[:_SHOWN])
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    return f"row {shown}" if len(where) == 1 else f"rows {shown}{more}"


def _label(value: Any) -> str | int | float | None:
    """A label as read: words stripped, whole numbers as int, holes as None."""
    if _hole(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    word = str(value).strip()
    return None if word.lower() == "nan" else word


def _classes(
    labels: list[Any], tables: Sequence[Table], options: DataOptions
) -> tuple[list[int], tuple[str, ...]]:
    """Integers and names of the classes: given names, else whole numbers or words in order."""
    name, source = options.label_column, tables[0].source
    given = {table.class_names for table in tables}
    if len(given) > 1:
        raise DataError(f"The parts of {source} do not agree on the names of their classes.")
    names = given.pop()
    if names is not None:
        wrong = sorted({label for label in labels if label not in range(len(names))})
        if wrong:
            raise DataError(
                f"{source}: column {name!r} holds {wrong[0]!r}, but its classes are "
                f"0 to {len(names) - 1} ({', '.join(names)})."
            )
        encoded: list[int] = labels
    else:
        numbers = _numbers(labels)
        if numbers is not None and not all(number.is_integer() for number in numbers):
            example = next(n for n in numbers if not n.is_integer())
            raise DataError(
                f"{source}: column {name!r} holds real numbers ({example:g}), not classes. "
                "Write a class for each range of them (such as low and high) into a column, and "
                "name it with label_column."
            )
        values = labels if numbers is None else [int(number) for number in numbers]
        values = values if numbers is not None else [str(value) for value in values]
        order = sorted(set(values))
        if len(order) > max(_MANY_CLASSES, len(values) // 2):
            raise DataError(
                f"{source}: column {name!r} holds {len(order)} different values in {len(values)} "
                "rows; that is no column of classes. The option label_column says which one to "
                "take."
            )
        index = {value: i for i, value in enumerate(order)}
        encoded = [index[value] for value in values]
        names = tuple(str(value) for value in order)
    present = set(encoded)
    if len(present) < 2:
        only = names[present.pop()]
        raise DataError(
            f"{source}: all {len(labels)} rows have the same label {only!r} in column {name!r}; "
            "classification needs at least two classes."
        )
    return encoded, names


def _numbers(labels: Iterable[Any]) -> list[float] | None:
    """All labels as numbers, or None if one is a word."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None
