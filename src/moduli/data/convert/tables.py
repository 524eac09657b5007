"""Write a table of columns as a parquet file that `datasets` and pandas read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as one parquet file; the same columns give the same bytes.

    Args:
        path: the file to make.
        columns: by name. Bytes in a column `image` are marked as encoded pictures, so that
            `datasets.Dataset.from_parquet` decodes them; everything else keeps its Python type.
    """
    import pyarrow.parquet
    from datasets import Dataset, Features, Image

    rows: dict[str, list[Any]] = {name: list(values) for name, values in columns.items()}
    features = None
    if "image" in rows:
        rest = Dataset.from_dict({name: rows[name][:1] for name in rows if name != "image"})
        features = Features({"image": Image(), **rest.features})
        rows["image"] = [{"bytes": value, "path": None} for value in rows["image"]]
    table = Dataset.from_dict(rows, features=features)
    # its own writer shows a progress bar and puts a fingerprint into the file
    pyarrow.parquet.write_table(table.data.table, path)
