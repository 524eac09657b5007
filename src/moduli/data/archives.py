"""Take named files out of wheels, sdists, npm and Debian packages and archives inside them.

Members are read by name and written to names that we choose, so what an archive claims about
paths, links or permissions never reaches the file system.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from io import BufferedWriter, BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from moduli.errors import FetchError, nearest

MAX_MEMBER_BYTES = 1 << 30
"""No file that we take is near this; a larger claim is a damaged or hostile archive."""

_AR_MAGIC = b"!<arch>\n"

# name of a member -> its size, or None if it is no regular file; and how to open one
_Contents = tuple[dict[str, int | None], Callable[[str], IO[bytes]]]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(archive: Path, members: tuple[tuple[str, str], ...], out: Path) -> None:
    """Write members of `archive` to files in the directory `out`.

    Args:
        archive: a zip (wheel), a tar of any compression (sdist, npm) or an ar (Debian).
        members: (member, path in `out`) pairs; "outer!inner" is a member of an archive in the
            archive. A path that ends in "/" is a folder: every regular file whose name matches
            the member as a shell pattern goes there under its own last name.
        out: an existing directory.

    Raises:
        FetchError: the archive cannot be read, a member is missing, is not a regular file, or is
            larger than `MAX_MEMBER_BYTES`; two members want the same place.
    """
    for member, target in members:
        _check_target(member, target)
    # an archive in the archive is unpacked once, however many of its members are wanted
    nested: dict[str, list[tuple[str, str]]] = {}
    for member, target in members:
        outer, bang, inner = member.partition("!")
        if bang:
            nested.setdefault(outer, []).append((inner, target))
    for outer, inside in nested.items():
        with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
            name = Path(outer).name
            extract(archive, ((outer, name),), Path(scratch))
            extract(Path(scratch) / name, tuple(inside), out)
    with _opened(archive) as (sizes, open_member):
        for member, target in members:
            if "!" in member:
                continue
            for name, path in _chosen(archive, sizes, member, target):
                destination = out / path
                destination.parent.mkdir(parents=True, exist_ok=True)
                with open_member(name) as source, _new(destination, archive) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)


def _chosen(
    archive: Path, sizes: dict[str, int | None], member: str, target: str
) -> Iterator[tuple[str, str]]:
    """The (member, path) pairs that a pair of the table stands for, checked."""
    if target.endswith("/"):
        found = [n for n, size in sizes.items() if size is not None and fnmatchcase(n, member)]
        if not found:
            raise FetchError(f"{archive.name} has no file like {member!r}.")
        pairs = [(name, target + name.rsplit("/", 1)[-1]) for name in found]
    else:
        pairs = [(member, target)]
    for name, path in pairs:
        _check_target(name, path)
        if name not in sizes:
            raise FetchError(f"{archive.name} has no member {name!r}. {nearest(name, sizes)}")
        size = sizes[name]
        if size is None:
            raise FetchError(f"{name!r} in {archive.name} is not a regular file.")
        if size > MAX_MEMBER_BYTES:
            raise FetchError(
                f"{name!r} in {archive.name} says it is {size} bytes; "
                f"nothing larger than {MAX_MEMBER_BYTES} is expected there."
            )
        yield name, path


def _check_target(member: str, target: str) -> None:
    parts = PurePosixPath(target).parts
    plain = all(Path(part).name == part and not part.startswith(".") for part in parts)
    if not parts or not plain:
        raise FetchError(f"{target!r} is not a plain file name to extract {member!r} to.")


def _new(path: Path, archive: Path) -> BufferedWriter:
    try:
        return path.open("xb")
    except FileExistsError:
        raise FetchError(f"Two members of {archive.name} would become {path.name}.") from None


@contextmanager
def _opened(archive: Path) -> Iterator[_Contents]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                sizes = {i.filename: None if i.is_dir() else i.file_size for i in zipped.infolist()}
                yield sizes, zipped.open
        elif _is_ar(archive):
            with archive.open("rb") as file:
                yield _ar(archive, file)
        else:
            with tarfile.open(archive) as tarred:
                entries = {entry.name: entry for entry in tarred.getmembers()}
                sizes = {name: e.size if e.isreg() else None for name, e in entries.items()}
                # never None: only regular files are opened
                yield sizes, lambda name: cast(IO[bytes], tarred.extractfile(entries[name]))
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError) as error:
        raise FetchError(f"{archive.name} cannot be read as an archive: {error}") from error


def _is_ar(archive: Path) -> bool:
    with archive.open("rb") as file:
        return file.read(len(_AR_MAGIC)) == _AR_MAGIC


def _ar(archive: Path, file: BinaryIO) -> _Contents:
    """Contents of an ar archive: 60-byte headers, each followed by its member, on even offsets."""
    sizes: dict[str, int | None] = {}
    starts: dict[str, int] = {}
    file.seek(len(_AR_MAGIC))
    while header := file.read(60):
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), header[48:58].strip()
        if len(header) != 60 or header[58:] != b"`\n" or not size.isdigit():
            raise FetchError(f"{archive.name} cannot be read as an archive: damaged ar header")
        sizes[name], starts[name] = int(size), file.tell()
        file.seek(int(size) + int(size) % 2, 1)

    def open_member(name: str) -> BytesIO:
        file.seek(starts[name])
        content = file.read(sizes[name] or 0)
        if len(content) != sizes[name]:
            raise FetchError(f"{archive.name} cannot be read as an archive: it ends in {name!r}")
        return BytesIO(content)

    return sizes, open_member
