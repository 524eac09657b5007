"""What can be learnt from a table: for each kind its columns, and how its labels get numbers.

The training side of a kind (model class, batches, metrics) is `moduli.training.kinds`, under the
same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moduli.data import cells
from moduli.data.cells import Cell
from moduli.data.labels import (
    as_numbers,
    encode_classes,
    encode_nothing,
    encode_sets,
    encode_tags,
)
from moduli.data.task import DataOptions
from moduli.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from datasets import Features

Encode = Callable[
    [list[Any], "tuple[str, ...] | None", str, str], "tuple[list[Any], tuple[str, ...]]"
]


@dataclass(frozen=True)
class DataKind:
    """The data side of a kind.

    Attributes:
        name: as in `Task.kind` and `DataOptions.kind`.
        inputs: what the model gets; rows that agree in all of them are repetitions.
        target: what it is to say; None where it learns the input itself.
        encode: numbers and names of the targets.
    """

    name: str
    inputs: tuple[Cell, ...]
    target: Cell | None
    encode: Encode = encode_nothing

    @property
    def columns(self) -> tuple[Cell, ...]:
        """All columns, the target last."""
        return self.inputs if self.target is None else (*self.inputs, self.target)

    def content(self, values: Mapping[str, Any]) -> str:
        """The inputs of a row as they count for repetition."""
        found = [(cell, values.get(cell.name)) for cell in self.inputs]
        return "\n".join("" if value is None else cell.key(value) for cell, value in found)

    def features(self, names: tuple[str, ...], present: set[str]) -> Features:
        """Types of the columns that are present, for `datasets`."""
        from datasets import ClassLabel, Features, List, Value

        text, media = Value("string"), {"path": Value("string"), "bytes": Value("binary")}
        types: dict[str, Any] = {
            "tokens": List(text),
            "image": {**media, "digest": text},
            "audio": {**media, "digest": text},
        }
        if self.encode is not encode_nothing:
            one = ClassLabel(names=list(names))
            types["label"] = List(one) if self.encode is encode_sets else one
            types["tags"] = List(one)
        elif self.target is cells.NUMBER:
            types["label"] = Value("float64")
        columns = [cell.name for cell in self.columns if cell.name in present]
        return Features({name: types.get(name, text) for name in columns})


KINDS: dict[str, DataKind] = {
    kind.name: kind
    for kind in (
        DataKind("classification", (cells.TEXT, cells.PAIR), cells.CLASS, encode_classes),
        DataKind("multilabel", (cells.TEXT, cells.PAIR), cells.LABELS, encode_sets),
        DataKind("regression", (cells.TEXT, cells.PAIR), cells.NUMBER),
        DataKind("token-classification", (cells.TOKENS,), cells.TAGS, encode_tags),
        DataKind("language-modeling", (cells.TEXT,), None),
        DataKind("seq2seq", (cells.SOURCE,), cells.TARGET),
        DataKind("translation", (cells.SOURCE,), cells.TARGET),
        DataKind("image-classification", (cells.IMAGE,), cells.CLASS, encode_classes),
        DataKind("audio-classification", (cells.AUDIO,), cells.CLASS, encode_classes),
    )
}


def data_kind(name: str) -> DataKind:
    """The kind of a name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in KINDS:
        raise UnknownNameError(f"There is no kind of task {name!r}. {nearest(name, KINDS)}")
    return KINDS[name]


def guess_kind(
    columns: Mapping[str, list[Any]], named: Mapping[str, Any], options: DataOptions
) -> tuple[DataKind, str]:
    """The kind that the columns of a table speak for, and the reason in words.

    Args:
        columns: of the table.
        named: columns whose integers the data names.
        options: names of the columns.
    """

    def has(*options_: str) -> bool:
        return all(getattr(options, option) in columns for option in options_)

    label = options.label_column
    if has("text_column", "label_column"):
        values = [value for value in columns[label] if not cells.no_label(value)]
        if any(isinstance(value, (list, tuple)) for value in values):
            return KINDS["multilabel"], f"column {label!r} holds lists"
        numbers = None if label in named else as_numbers(values)
        if numbers and not all(number.is_integer() for number in numbers):
            return KINDS["regression"], f"column {label!r} holds real numbers"
        return KINDS["classification"], f"column {label!r} holds words or whole numbers"
    for name in ("image-classification", "audio-classification", "token-classification", "seq2seq"):
        options_ = [cell.option for cell in KINDS[name].columns]
        if has(*options_):
            found = " and ".join(repr(getattr(options, option)) for option in options_)
            return KINDS[name], f"it has the columns {found}"
    return KINDS["classification"], "that is the default"
