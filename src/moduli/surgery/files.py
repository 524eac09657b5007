"""Directories that are written whole or not at all, and weight files that are safe to read."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moduli.errors import CheckpointError

MARKER = "moduli.json"
COMPOSED = "moduli_compose.json"  # beside a checkpoint of a stock class that was composed
EXPORTED = "moduli_export.json"  # or exported
OWN = "moduli.safetensors"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends well.

    Whatever goes wrong in the block (disk full, Ctrl-C), nothing of it stays behind and an
    existing `target` is untouched.

    Raises:
        CheckpointError: `target` exists and is neither empty nor a directory written by moduli,
            or writing failed.
    """
    check_target(target)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        _sync(temporary)
        _put_in_place(temporary, target)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"could not write {target}: {reason}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise unless a checkpoint may be written to `target`.

    Raises:
        CheckpointError: it is a file, or a non-empty directory without our marker.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is not a directory")
    ours = any((target / name).exists() for name in (MARKER, COMPOSED, EXPORTED))
    if any(target.iterdir()) and not ours:
        raise CheckpointError(
            f"{target} exists and was not written by moduli (it has no {MARKER}); "
            "choose another directory or remove it"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the ordinary part of a checkpoint, in name order.

    Raises:
        CheckpointError: there are none; says so plainly where only pickle files are.
    """
    found = sorted(p for p in directory.glob("*.safetensors") if p.name != "moduli.safetensors")
    if found:
        return found
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt")
    )
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights as pickle only ({', '.join(pickles)}), which can run "
            "code when it is read; moduli loads safetensors. Convert it once in a place you "
            "trust, with save_pretrained of transformers"
        )
    raise CheckpointError(f"{directory} has no safetensors weights")


def check_readable(path: Path) -> None:
    """Raise unless the file is complete safetensors.

    Raises:
        CheckpointError: truncated or otherwise damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / "was")
    try:
        temporary.rename(target)
    except BaseException:
        (old / "was").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
