"""Columns from the user's own files (CSV, JSON lines, Parquet) and from `datasets`.

Files are read strictly: a line that does not fit is an error with its number, not a guess.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moduli.data.rows import Table
from moduli.data.task import DataOptions
from moduli.errors import DataError

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def read_files(kind: str, spec: str, options: DataOptions) -> list[Table]:
    """Tables of "PATH" or "PATH,validation=PATH,test=PATH" (each of the two may be absent).

    Args:
        kind: key of `READERS`.
        spec: one file to split, or the training file and the given others.
        options: which columns are wanted.

    Raises:
        DataError: a file is missing, cannot be read, or is not of this kind.
    """
    train, *others = re.split(r",(?=(?:validation|test)=)", spec)
    paths = {"train": train} | dict(other.split("=", 1) for other in others)
    tables = []
    for split, text in paths.items():
        path = Path(text).expanduser()
        if not path.is_file():
            what = "is a directory, not a file" if path.is_dir() else "does not exist"
            near = _neighbours(path)
            raise DataError(f"{path} {what}.{near}")
        try:
            columns = READERS[kind](path, options)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text (byte {error.start}: {error.reason}). "
                "Save it as UTF-8 first."
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        parent = path.absolute().parent
        tables.append(Table(str(path), columns, split if others else None, folder=parent))
    return tables


def read_hub(name: str, options: DataOptions) -> tuple[list[Table], list[str]]:
    """Tables of a `datasets.load_dataset` name or local directory, and notes.

    "NAME" or "NAME:CONFIGURATION". A split whose labels are all absent (None or -1, as in hidden
    test sets) is ignored with a note, as are splits that are not train, validation or test.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets import load_dataset

    base, _, configuration = (name, "", "") if Path(name).exists() else name.partition(":")
    try:
        loaded = load_dataset(base, configuration or None)
    except Exception as error:  # load_dataset raises many unrelated types
        raise DataError(
            f"{name!r} is no task of moduli, and datasets.load_dataset could not load it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Own files are named csv:PATH, jsonl:PATH or parquet:PATH."
        ) from error
    notes: list[str] = []
    tables = []
    for split, data in loaded.items():
        source = f"{name} ({split})"
        named = {c: names for c in data.column_names if (names := _names(data.features[c]))}
        names = named.get(options.label_column)
        data = _undecoded(data)
        columns = {c: list(data[c]) for c in data.column_names if c in _wanted(options)}
        # the others are known by name only, for messages
        columns |= {c: [] for c in data.column_names if c not in columns}
        labels = columns.get(options.label_column, [])
        hidden = bool(labels) and all(v is None or (names and v == -1) for v in labels)
        known = _SPLIT_NAMES.get(split)
        if len(loaded) > 1 and (known is None or hidden):
            reason = "it has no labels" if hidden else "it is not train, validation or test"
            notes.append(f"{source} is not used: {reason}.")
            continue
        if names:
            columns[options.label_column] = [None if v == -1 else v for v in labels]
        tables.append(Table(source, columns, known, named))
    if len(tables) == 1:
        only = tables[0]
        tables = [Table(only.source, only.columns, None, only.class_names)]
    elif all(table.split != "train" for table in tables):
        raise DataError(f"{name} has no split to train on; its splits: {', '.join(loaded)}.")
    return tables, notes


def _wanted(options: DataOptions) -> set[str | None]:
    fields = [f.name for f in dataclasses.fields(options) if f.name.endswith("_column")]
    return {getattr(options, name) for name in fields}


def _names(feature: Any) -> tuple[str, ...] | None:
    """The names of the integers of a column, or of the lists of integers in it."""
    names = getattr(feature, "names", None) or getattr(
        getattr(feature, "feature", None), "names", None
    )
    return tuple(names) if names else None


def _undecoded(data: Any) -> Any:
    """Images and sound as paths or bytes; they are decoded batch by batch, in training."""
    from datasets import Audio, Image

    for column, feature in data.features.items():
        if isinstance(feature, (Audio, Image)):
            data = data.cast_column(column, type(feature)(decode=False))
    return data


def _neighbours(path: Path) -> str:
    """Files beside a missing one that have its suffix, as the nearest things that work."""
    if not path.parent.is_dir():
        return f" Neither does its folder {path.parent}." if not path.parent.exists() else ""
    beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}") if p.is_file())[:5]
    return f" In {path.parent} there are: {', '.join(beside)}." if beside else ""


def _read_csv(path: Path, _options: DataOptions) -> dict[str, list[Any]]:
    """All columns as text; tabs separate them if the name ends in .tsv."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    delimiter = "\t" if path.suffix == ".tsv" else ","
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    text = path.read_bytes()
    text.decode("utf-8")
    # one block: a record may be of any length
    read = pacsv.ReadOptions(block_size=min(len(text), 2**31 - 1))
    try:
        header = pacsv.open_csv(pa.BufferReader(text), read, parse).schema.names
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path} has two columns named {twice[0]!r}; rename one.")
        convert = pacsv.ConvertOptions(
            column_types={name: pa.string() for name in header},
            strings_can_be_null=False,
        )
        table = pacsv.read_csv(pa.BufferReader(text), read, parse, convert)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a well-formed CSV file: {error}. A text that contains "
            f"{delimiter!r}, a quote or a line break must be in double quotes."
        ) from error
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


def _read_jsonl(path: Path, _options: DataOptions) -> dict[str, list[Any]]:
    records = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path} line {number} is {type(record).__name__}; every line must be an object "
                'such as {"text": "...", "label": "..."}.'
            )
        records.append(record)
    names = list(dict.fromkeys(key for record in records for key in record))
    return {name: [record.get(name) for record in records] for name in names}


def _read_parquet(path: Path, options: DataOptions) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in _wanted(options)]
            columns: dict[str, list[Any]] = file.read(columns=wanted).to_pydict()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    # the others are known by name only, for messages
    return columns | {name: [] for name in names if name not in columns}


READERS: dict[str, Callable[[Path, DataOptions], dict[str, list[Any]]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
