"""A small real package in a local folder, so that the machinery runs with the real pip offline."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from moduli.data.packages import Package, Source


@dataclass(frozen=True)
class Shelf:
    """A folder of wheels that pip searches instead of an index, and an empty cache."""

    folder: Path
    cache: Path

    def wheel(self, files: dict[str, bytes], name: str = "moduli_probe") -> Package:
        """Put a wheel with these files on the shelf; the row that fetches all of them."""
        path = self.folder / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        meta = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        with zipfile.ZipFile(path, "w") as wheel:
            for member, content in (files | meta).items():
                wheel.writestr(member, content)
        source = Source(
            package=name.replace("_", "-"),
            version="1.0",
            archive=path.name,
            archive_kind="wheel",
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            megabytes=0,
            members=tuple((member, Path(member).name) for member in files),
        )
        return Package(
            name="probe", kind="data", summary="a probe", sources=(source,), licence="none"
        )

    def left_over(self) -> list[str]:
        """What the cache holds apart from lock files."""
        if not self.cache.exists():
            return []
        return sorted(p.name for p in self.cache.iterdir() if p.suffix != ".lock")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith(("PIP_", "MODULI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Shelf(folder, tmp_path / "cache")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty directories: what a converter reads, and where it writes."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    return source, out


def altered(package: Package, **changes: object) -> Package:
    """The same row with another pin or other members of its only archive."""
    (source,) = package.sources
    return replace(package, sources=(replace(source, **changes),))  # type: ignore[arg-type]


def other_hash(package: Package) -> Package:
    """The same row, expecting an archive that does not exist."""
    return altered(package, sha256="0" * 64)
