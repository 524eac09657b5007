"""A run in flight: its hidden directory (`.NAME.partial`), its lock, and a disk that fails.

What is in flight is never taken for finished, because a run's own directory appears by one rename.
A lock is the operating system's, so that of a killed process holds up nobody.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moduli.errors import CheckpointError, ConfigError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Errors of the disk wherever they happen, which are not the fault of a run."""
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
"""Errors of the disk at a run's own paths only; elsewhere they are of its data or its method."""
_SIGNS = ("(os error 28)", "unexpected pos ", "PytorchStreamWriter failed")
"""In the errors that safetensors and `torch.save` raise where the disk is full."""


class BusyError(ConfigError):
    """Another process is working on this run."""


def partial_of(target: Path) -> Path:
    """Where a run that is to appear at `target` is while it is in flight."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Nobody else works on the run meanwhile; the lock's file goes when the run is there.

    Raises:
        BusyError: somebody does.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_of(target)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"Another process is working on {target}. Wait for it, or choose another directory."
        ) from None
    try:
        yield
        # Only when the run is there: whoever has opened the file meanwhile then finds the run.
        path.unlink(missing_ok=True)
    finally:
        lock.release()


def _lock_of(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def sweep(target: Path) -> None:
    """Delete what a process that was killed just after a run had appeared left beside it."""
    if not (partial_of(target).exists() or _lock_of(target).exists()):
        return
    # Whoever is deleting it already may go on; where nothing can be deleted, it does no harm.
    with suppress(BusyError, OSError), locked(target):
        shutil.rmtree(partial_of(target), ignore_errors=True)


@contextmanager
def disk_named(target: Path) -> Iterator[None]:
    """Say at which run the disk failed.

    Raises:
        CheckpointError: it did.
    """
    try:
        yield
    except Exception as error:
        if (trouble := disk_trouble(error, target)) is None:
            raise
        raise CheckpointError(
            f"The disk stopped the run in {target}: {trouble}. Finished runs and checkpoints are "
            "kept; start again when that is mended."
        ) from error


def disk_trouble(error: BaseException | None, target: Path) -> str | None:
    """What the disk said, if it is behind an error of the run in `target`; None if it is not."""
    while error is not None:
        if isinstance(error, OSError) and (
            error.errno in _DISK or (error.errno in _REFUSED and _keeps_out(error, target))
        ):
            return str(error)
        if any(sign in str(error) for sign in _SIGNS):
            return f"no space left on device ({str(error).splitlines()[0]})"
        error = error.__cause__
    return None


def _keeps_out(error: OSError, target: Path) -> bool:
    """Whether it is about what the run writes, or the directory for that could not be made."""
    if not target.parent.is_dir():  # before it is there, no work of the run has begun
        return True
    own = [os.path.realpath(path) for path in (target, partial_of(target), _lock_of(target))]
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    paths = [Path(os.path.realpath(os.fsdecode(name))) for name in named]
    return any(path.is_relative_to(mine) for path in paths for mine in own)
