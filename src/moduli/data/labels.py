"""From labels as they were read to integers with names: classes, sets of labels, tags.

The order of names never depends on the order of rows: names that the data brings come first in
their own order, else whole numbers by size and words by alphabet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from moduli.errors import DataError

_MANY_CLASSES = 20
_SEPARATORS = ",;|"


def encode_classes(
    labels: list[Any], given: tuple[str, ...] | None, source: str, column: str
) -> tuple[list[Any], tuple[str, ...]]:
    """One class per row.

    Args:
        labels: as read.
        given: names of the integers, where the data brings them.
        source: what to call the data in messages.
        column: the column of the labels.

    Raises:
        DataError: they are not classes, or all the same.
    """
    if given is None and (numbers := as_numbers(labels)) is not None:
        real = [number for number in numbers if not number.is_integer()]
        if real:
            raise DataError(
                f"{source}: column {column!r} holds real numbers ({real[0]:g}), not classes. "
                "To learn the numbers, give kind='regression'; or write a class for each range of "
                "them (such as low and high) into a column, and name it with label_column."
            )
    encoded, names = _numbered([[label] for label in labels], given, source, column)
    classes = [one for (one,) in encoded]
    if given is None and len(names) > max(_MANY_CLASSES, len(labels) // 2):
        raise DataError(
            f"{source}: column {column!r} holds {len(names)} different values in {len(labels)} "
            "rows; that is no column of classes. The option label_column says which one to take."
        )
    _require_two(set(classes), names, len(labels), source, column)
    return classes, names


def encode_sets(
    labels: list[Any], given: tuple[str, ...] | None, source: str, column: str
) -> tuple[list[Any], tuple[str, ...]]:
    """Any number of labels per row; see `encode_classes`.

    Texts are cut at commas, semicolons and bars; where the column has none of these, at white
    space.
    """
    texts = [label for label in labels if isinstance(label, str)]
    separators = [mark for mark in _SEPARATORS if any(mark in text for text in texts)]

    def cut(text: str) -> list[Any]:
        for mark in separators:
            text = text.replace(mark, "\n")
        parts = text.split("\n") if separators else text.split()
        return [part.strip() for part in parts if part.strip()]

    sets = [cut(label) if isinstance(label, str) else label for label in labels]
    encoded, names = _numbered(sets, given, source, column)
    if not names:
        raise DataError(f"{source}: no row has a label in column {column!r}.")
    return [sorted(set(row)) for row in encoded], names


def encode_tags(
    labels: list[Any], given: tuple[str, ...] | None, source: str, column: str
) -> tuple[list[Any], tuple[str, ...]]:
    """One tag per word; see `encode_classes`."""
    encoded, names = _numbered(labels, given, source, column)
    present = {tag for row in encoded for tag in row}
    _require_two(present, names, len(labels), source, column)
    return list(encoded), names


def encode_nothing(
    labels: list[Any], given: tuple[str, ...] | None, source: str, column: str
) -> tuple[list[Any], tuple[str, ...]]:
    """Numbers and texts stand for themselves."""
    return labels, ()


def as_numbers(labels: Iterable[Any]) -> list[float] | None:
    """All labels as numbers, or None if one is a word or a list."""
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError):
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def _numbered(
    rows: Sequence[Sequence[Any]], given: tuple[str, ...] | None, source: str, column: str
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Integers for the labels of every row, and their names."""
    flat = [label for row in rows for label in row]
    if given is not None:
        if all(isinstance(label, str) for label in flat) and set(flat) <= set(given):
            index = {name: i for i, name in enumerate(given)}
            return [[index[label] for label in row] for row in rows], given
        wrong = sorted({label for label in flat if label not in range(len(given))}, key=str)
        if wrong:
            raise DataError(
                f"{source}: column {column!r} holds {wrong[0]!r}, but its classes are "
                f"0 to {len(given) - 1} ({', '.join(given)})."
            )
        return [list(row) for row in rows], given
    numbers = as_numbers(flat)
    whole = numbers is not None and all(number.is_integer() for number in numbers)
    as_value = (lambda label: int(float(label))) if whole else str
    order = sorted({as_value(label) for label in flat})
    index_of = {value: i for i, value in enumerate(order)}
    encoded = [[index_of[as_value(label)] for label in row] for row in rows]
    return encoded, tuple(str(value) for value in order)


def _require_two(
    present: set[int], names: tuple[str, ...], rows: int, source: str, column: str
) -> None:
    if len(present) < 2:
        only = names[present.pop()]
        raise DataError(
            f"{source}: all {rows} rows have the same label {only!r} in column {column!r}; "
            "classification needs at least two classes."
        )
