"""Text files that are there completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from moduli.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Write a file by one rename; directories on the way to it are made.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
