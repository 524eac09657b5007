"""Take named files out of wheels, sdists and archives inside them, and nothing else.

Members are read by name and written to names that we choose, so what an archive claims about
paths, links or permissions never reaches the file system.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moduli.errors import FetchError, nearest

MAX_MEMBER_BYTES = 1 << 30
"""No file that we take is near this; a larger claim is a damaged or hostile archive."""


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(archive: Path, members: tuple[tuple[str, str], ...], out: Path) -> None:
    """Write each named member of `archive` to its file name in the directory `out`.

    Args:
        archive: a zip (wheel) or a tar of any compression (sdist).
        members: (member, file name) pairs; "outer!inner" is a member of an archive in the archive.
        out: an existing directory.

    Raises:
        FetchError: the archive cannot be read, a member is missing, is not a regular file, or is
            larger than `MAX_MEMBER_BYTES`.
    """
    for member, target in members:
        if Path(target).name != target:
            raise FetchError(f"{target!r} is not a plain file name to extract {member!r} to.")
        with _open(archive, member) as source, (out / target).open("xb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


@contextmanager
def _open(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """The bytes of one member, through as many nested archives as its name has `!`."""
    outer, bang, inner = member.partition("!")
    with _open_one(archive, outer) as source:
        if not bang:
            yield source
            return
        with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
            nested = Path(scratch) / Path(outer).name
            with nested.open("xb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            with _open(nested, inner) as result:
                yield result


@contextmanager
def _open_one(archive: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                _require(member, zipped.namelist(), archive)
                info = zipped.getinfo(member)
                _check_size(member, info.file_size, archive)
                with zipped.open(info) as file:
                    yield file
        else:
            with tarfile.open(archive) as tarred:
                _require(member, tarred.getnames(), archive)
                entry = tarred.getmember(member)
                stream = tarred.extractfile(entry) if entry.isreg() else None
                if stream is None:
                    raise FetchError(f"{member!r} in {archive.name} is not a regular file.")
                _check_size(member, entry.size, archive)
                with stream:
                    yield stream
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{archive.name} cannot be read as an archive: {error}") from error


def _require(member: str, names: list[str], archive: Path) -> None:
    if member not in names:
        raise FetchError(f"{archive.name} has no member {member!r}. {nearest(member, names)}")


def _check_size(member: str, size: int, archive: Path) -> None:
    if size > MAX_MEMBER_BYTES:
        raise FetchError(
            f"{member!r} in {archive.name} says it is {size} bytes; "
            f"nothing larger than {MAX_MEMBER_BYTES} is expected there."
        )
