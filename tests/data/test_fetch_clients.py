"""npm and apt-get as they are on this machine, on packages made here; and reading of .deb files."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moduli.data.archives import extract, sha256_of
from moduli.data.fetching import fetch_package
from moduli.data.packages import Package, Source
from moduli.errors import FetchError

from .conftest import Shelf, altered, other_hash

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        alias = tarfile.TarInfo("./usr/share/man/xx/man1/alias.1")
        alias.type, alias.linkname = tarfile.SYMTYPE, "page.1"
        archive.addfile(alias)
    return sink.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def row(source: Source) -> Package:
    return Package(name="probe", kind="data", summary="a probe", sources=(source,), licence="none")


PAGES = {"./usr/share/man/xx/man1/page.1": b"one", "./usr/share/man/xx/man5/other.5": b"five"}
CONTROL = (
    b"Package: moduli-probe\nVersion: 1:1.0-1\nArchitecture: all\nMaintainer: nobody\n"
    b"Description: a probe\n"
)
DEB = ar(
    {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar({"./control": CONTROL}),
        "data.tar.xz": tar(PAGES, "w:xz"),
    }
)


@pytest.fixture
def npm_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Package]:
    """A row for a scoped npm package with a script, and a registry on this machine that has it."""
    ran = tmp_path / "ran"
    manifest = {
        "name": "@moduli/probe",
        "version": "1.0.0",
        "scripts": dict.fromkeys(("prepack", "prepare", "install"), f"touch {ran}"),
    }
    tgz = tar({"package/package.json": json.dumps(manifest).encode(), "package/a.txt": b"alpha\n"})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = f"http://127.0.0.1:{self.server.server_address[1]}"
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(tgz).digest()).decode()
            dist = {"tarball": f"{host}/probe.tgz", "integrity": integrity}
            listing = {
                "name": "@moduli/probe",
                "dist-tags": {"latest": "1.0.0"},
                "versions": {"1.0.0": manifest | {"dist": dist}},
            }
            body = tgz if self.path == "/probe.tgz" else json.dumps(listing).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    yield row(
        Source(
            package="@moduli/probe",
            version="1.0.0",
            archive="moduli-probe-1.0.0.tgz",
            archive_kind="npm",
            sha256=hashlib.sha256(tgz).hexdigest(),
            megabytes=1,
            members=(("package/a.txt", "sub/a.txt"),),
        )
    )
    server.shutdown()
    server.server_close()
    assert not ran.exists()  # no script of the package ever runs


@needs_npm
def test_npm_brings_a_package_and_its_hash_is_checked(npm_row: Package, shelf: Shelf) -> None:
    with pytest.raises(FetchError, match="sha256 given"):
        fetch_package(other_hash(npm_row), cache=shelf.cache)
    assert shelf.left_over() == []
    path = fetch_package(npm_row, cache=shelf.cache)
    assert (path / "sub" / "a.txt").read_bytes() == b"alpha\n"
    assert shelf.left_over() == ["probe"]


@needs_npm
def test_an_npm_failure_says_the_command_and_the_way_out(npm_row: Package, shelf: Shelf) -> None:
    with pytest.raises(FetchError, match=r"@moduli/probe@9\.9\.9") as caught:
        fetch_package(altered(npm_row, version="9.9.9"), cache=shelf.cache)
    assert "npm pack" in str(caught.value)
    assert "MODULI_PACKAGES" in str(caught.value)
    assert shelf.left_over() == []


@pytest.mark.parametrize(("kind", "program"), [("npm", "npm"), ("deb", "apt-get")])
def test_a_missing_client_is_named(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, kind: str, program: str
) -> None:
    monkeypatch.setenv("PATH", "")
    package = altered(shelf.wheel({"a/b": b"c"}), archive_kind=kind)
    with pytest.raises(FetchError, match=f"downloaded by {program}, which is not on the PATH"):
        fetch_package(package, cache=shelf.cache)
    assert shelf.left_over() == []


def test_a_missing_program_of_a_converter_is_said_first(shelf: Shelf) -> None:
    package = replace(shelf.wheel({"a/b": b"c"}), programs=(("no-such-program", "its-package"),))
    events: list[str] = []
    with pytest.raises(FetchError, match=r"no-such-program.*Debian: its-package"):
        fetch_package(package, cache=shelf.cache, on_event=events.append)
    assert events == []


@needs_apt
def test_apt_get_brings_a_package_where_no_list_knows_it_yet(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's lists are empty, so lists of our own are made; they stay the only ones."""
    repository, state = tmp_path / "repository", tmp_path / "state"
    repository.mkdir()
    (state / "lists" / "partial").mkdir(parents=True)
    (repository / "moduli-probe_1.0-1_all.deb").write_bytes(DEB)
    entry = CONTROL.decode() + (
        f"Filename: ./moduli-probe_1.0-1_all.deb\nSize: {len(DEB)}\n"
        f"SHA256: {hashlib.sha256(DEB).hexdigest()}\n"
    )
    (repository / "Packages.gz").write_bytes(gzip.compress(entry.encode()))
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] copy:{repository} ./\n")
    (tmp_path / "status").write_text("")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list";\nDir::Etc::SourceParts "-";\n'
        f'Dir::State::Lists "{state}/lists";\nDir::State::Status "{tmp_path}/status";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    source = Source(
        package="moduli-probe",
        version="1:1.0-1",
        archive="moduli-probe_1%3a1.0-1_all.deb",
        archive_kind="deb",
        sha256=hashlib.sha256(DEB).hexdigest(),
        megabytes=1,
        members=(("data.tar.xz!./usr/share/man/xx/man*/*", "xx/"),),
    )
    path = fetch_package(row(source), cache=shelf.cache)
    assert {p.name: p.read_bytes() for p in (path / "xx").iterdir()} == {
        "page.1": b"one",
        "other.5": b"five",
    }
    assert [p.name for p in (state / "lists").iterdir()] == ["partial"]
    assert shelf.left_over() == ["probe"]
    with pytest.raises(FetchError, match=r"moduli-probe=2\.0"):
        fetch_package(altered(row(source), version="2.0"), cache=shelf.cache)


def test_members_of_a_deb_come_out_by_name_and_by_pattern(tmp_path: Path) -> None:
    path, out = tmp_path / "probe.deb", tmp_path / "out"
    out.mkdir()
    path.write_bytes(DEB)
    pattern = "data.tar.xz!./usr/share/man/xx/*"
    extract(path, ((pattern, "pages/"), ("debian-binary", "version")), out)
    assert (out / "version").read_bytes() == b"2.0\n"
    # the alias is a link, which no pattern takes
    assert sorted(p.name for p in (out / "pages").iterdir()) == ["other.5", "page.1"]
    with pytest.raises(FetchError, match="Two members"):
        extract(path, ((pattern, "pages/"),), out)
    with pytest.raises(FetchError, match="no file like"):
        extract(path, (("data.tar.xz!./usr/share/info/*", "pages/"),), out)
    with pytest.raises(FetchError, match=r"Did you mean 'data\.tar\.xz'"):
        extract(path, (("data.tar.gz!x", "x"),), out)


@pytest.mark.parametrize("cut", [20, 100, len(DEB) - 30])
def test_a_truncated_deb_is_a_fetch_error(tmp_path: Path, cut: int) -> None:
    path, out = tmp_path / "probe.deb", tmp_path / "out"
    out.mkdir()
    path.write_bytes(DEB[:cut])
    with pytest.raises(FetchError):
        extract(path, (("data.tar.xz!./usr/share/man/xx/*", "pages/"),), out)


def test_several_archives_become_one_entry(shelf: Shelf) -> None:
    one = shelf.wheel({"moduli_probe/a.txt": b"alpha\n"})
    two = shelf.wheel({"moduli_other/b.txt": b"beta\n"}, name="moduli_other")
    both = replace(one, sources=one.sources + two.sources)
    path = fetch_package(both, cache=shelf.cache)
    assert (path / "a.txt").read_bytes() == b"alpha\n"
    assert (path / "b.txt").read_bytes() == b"beta\n"
    assert sha256_of(path / "a.txt") in (path / "moduli-fetch.json").read_text()
    # the second archive is not what the table says: the first is not kept either
    wrong = replace(both, name="wrong", sources=one.sources + other_hash(two).sources)
    with pytest.raises(FetchError, match="is not the archive"):
        fetch_package(wrong, cache=shelf.cache)
    assert shelf.left_over() == ["probe"]
