"""apt-get on a small signed release made here: lists are verified, or nothing is kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moduli.data.fetching import fetch_package
from moduli.data.packages import Package, Source
from moduli.errors import FetchError

from .conftest import Shelf

needs_apt = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("apt-get", "gpg", "gpgv")),
    reason="apt-get or gpg is not installed",
)

LISTS = {
    "binary-amd64/Packages": "Package: probe\nVersion: 1\nArchitecture: all\nDescription: a probe\n"
    f"Description-md5: {'0' * 32}\nFilename: probe.deb\nSize: 1\nSHA256: {'0' * 64}\n",
    "i18n/Translation-en": f"Package: probe\nDescription-md5: {'0' * 32}\n"
    "Description-en: a probe\n",
    "i18n/Translation-pt_BR": f"Package: probe\nDescription-md5: {'0' * 32}\n"
    "Description-pt_BR: uma sonda\n",
}
ROW = Package(
    name="probe",
    kind="data",
    summary="a probe",
    sources=(
        Source(
            package="bookworm/main",
            version="current",
            archive="bookworm-main-lists.tar",
            archive_kind="lists",
            sha256=None,
            megabytes=1,
            members=tuple((name, name) for name in ("InRelease", "Packages", "Translation-pt_BR")),
        ),
    ),
    licence="none",
)


class Release:
    """A release of one package, signed by a key of its own, as the only source of apt-get."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.dist = folder / "repository" / "dists" / "bookworm"
        self.home = home
        for name, text in LISTS.items():
            path = self.dist / "main" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        self._gpg("--quick-generate-key", "probe", "ed25519", "default", "never")
        self._gpg("--output", str(folder / "key.gpg"), "--export", "probe")
        key = f"signed-by={folder / 'key.gpg'}"
        source = f"deb [arch=amd64 {key}] copy:{folder / 'repository'} bookworm main\n"
        (folder / "sources.list").write_text(source)
        (folder / "status").write_text("")
        (folder / "apt.conf").write_text(
            f'Dir::Etc::SourceList "{folder}/sources.list";\nDir::Etc::SourceParts "-";\n'
            f'Dir::State::Status "{folder}/status";\nAPT::Sandbox::User "root";\n'
            'Acquire::Languages "none";\nAcquire::GzipIndexes "true";\n'
        )
        self.sign()

    def sign(self) -> None:
        """Write what the release holds, and sign that."""
        lines = ["Codename: bookworm", "Suite: oldstable", "Components: main"]
        lines += ["Architectures: amd64", "Date: Sat, 11 Jul 2026 10:16:37 UTC", "SHA256:"]
        for name in LISTS:
            content = (self.dist / "main" / name).read_bytes()
            lines.append(f" {hashlib.sha256(content).hexdigest()} {len(content)} main/{name}")
        release = self.home / "Release"
        release.write_text("\n".join(lines) + "\n")
        signed = self.dist / "InRelease"
        self._gpg("--yes", "--output", str(signed), "--clearsign", str(release))

    def _gpg(self, *arguments: str) -> None:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--passphrase", "", "--quiet"]
        subprocess.run([*command, "--pinentry-mode", "loopback", *arguments], check=True)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    with tempfile.TemporaryDirectory() as home:  # short: a socket of gpg's has to fit in its name
        made = Release(tmp_path, Path(home))
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
        yield made
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "gpg-agent"], check=False)


@needs_apt
def test_signed_lists_come_whatever_languages_the_system_wants(
    release: Release, shelf: Shelf
) -> None:
    path = fetch_package(ROW, cache=shelf.cache)
    translation = (path / "Translation-pt_BR").read_text()
    assert translation == LISTS["i18n/Translation-pt_BR"]
    assert (path / "Packages").read_text() == LISTS["binary-amd64/Packages"]
    assert hashlib.sha256(translation.encode()).hexdigest() in (path / "InRelease").read_text()
    assert shelf.left_over() == ["probe"]


@needs_apt
def test_a_list_that_is_not_the_signed_one_is_refused(release: Release, shelf: Shelf) -> None:
    (release.dist / "main" / "i18n" / "Translation-pt_BR").write_text(
        LISTS["i18n/Translation-pt_BR"].replace("sonda", "senda")
    )
    with pytest.raises(FetchError, match="Hash Sum mismatch") as caught:
        fetch_package(ROW, cache=shelf.cache)
    assert "apt-get" in str(caught.value)
    assert "copy its folder from the cache" in str(caught.value)
    assert shelf.left_over() == []


@needs_apt
def test_a_release_signed_by_another_key_is_refused(
    release: Release, shelf: Shelf, tmp_path: Path
) -> None:
    signed = release.dist / "InRelease"
    signed.write_text(signed.read_text().replace("Suite: oldstable", "Suite: stable"))
    with pytest.raises(FetchError, match="no verified InRelease, Packages, Translation-pt_BR"):
        fetch_package(ROW, cache=shelf.cache)
    assert shelf.left_over() == []


@needs_apt
def test_a_release_that_the_sources_lack_is_named(release: Release, shelf: Shelf) -> None:
    (source,) = ROW.sources
    other = replace(ROW, sources=(replace(source, package="trixie/main"),))
    with pytest.raises(FetchError, match="Is trixie/main among the sources"):
        fetch_package(other, cache=shelf.cache)


def test_without_apt_get_the_way_out_is_to_copy_the_folder(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match="by apt-get, which is not on the PATH") as caught:
        fetch_package(ROW, cache=shelf.cache)
    assert "copy its folder from the cache" in str(caught.value)


def test_lists_are_never_taken_from_a_folder_where_nothing_would_check_them(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MODULI_PACKAGES", str(shelf.folder))
    (shelf.folder / "bookworm-main-lists.tar").write_bytes(b"")
    with pytest.raises(FetchError, match="apt-get"):
        fetch_package(ROW, cache=shelf.cache)
