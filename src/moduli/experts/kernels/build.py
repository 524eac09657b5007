"""Compiling C++ once per machine, where there is a compiler.

Each source is one file without PyTorch's headers, compiled in seconds into the cache and loaded
with ctypes. Its OpenMP calls are answered by the runtime that PyTorch has already loaded, so that
both share their threads and their number.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from ctypes import c_int, c_void_p
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from moduli.cache import cache_dir

log = logging.getLogger(__name__)
OFF = "MODULI_NATIVE"
"""Environment variable; 0 switches all C++ off."""

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The loaded expert kernel, or why there is none; compiles it at the first call."""
    found = compiled(SOURCE, "expert")
    if not isinstance(found, str):
        found.moduli_forward.argtypes = (c_void_p, c_int, c_int, c_int, c_void_p)
        found.moduli_backward.argtypes = (c_void_p, c_void_p, c_int, c_int)
    return found


def compiled(source: Path, name: str) -> ctypes.CDLL | str:
    """A source as a loaded library, or why there is none; compiles it if nobody has on this
    machine.

    Args:
        source: one C++ file.
        name: what it is called in the cache and in messages.
    """
    if os.environ.get(OFF, "") == "0":
        return f"switched off by {OFF}=0"
    found = _loaded(source, name)
    if isinstance(found, str):
        log.warning("no C++ %s kernel, others compute instead: %s", name, found)
    return found


def _loaded(source: Path, name: str) -> ctypes.CDLL | str:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        return "there is no C++ compiler"
    try:
        return ctypes.CDLL(str(_built(compiler, source, name)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        lines = [line for line in str(detail).splitlines() if line.strip()]
        return f"{compiler} failed: {lines[0] if lines else type(error).__name__}"


def machine() -> str:
    """What compiled code and measurements depend on: the processor and its instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        lines = text.split("\n\n")[0].splitlines()
        kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
        return "\n".join(kept)
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _built(compiler: str, source: Path, name: str) -> Path:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    parts = (source.read_text(encoding="utf-8"), " ".join(FLAGS), version, machine())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    directory = cache_dir() / "machine"
    target = directory / f"{name}-{key}.so"
    if _intact(target):
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not _intact(target):
            log.warning(
                "compiling the C++ %s kernel, once on this machine (%s=0: do not)", name, OFF
            )
            partial = target.with_suffix(f".{os.getpid()}.partial")
            # Without the compiler's own OpenMP runtime: two in one process would keep two pools.
            objects = partial.with_suffix(".o")
            steps = [
                [compiler, *FLAGS, "-c", str(source), "-o", str(objects)],
                [compiler, "-shared", str(objects), "-o", str(partial)],
            ]
            try:
                for step in steps:
                    subprocess.run(step, capture_output=True, text=True, check=True, timeout=600)
                digest = _digest(partial)
                os.replace(partial, target)
                _seal(target).write_text(digest, encoding="utf-8")
            finally:
                objects.unlink(missing_ok=True)
                partial.unlink(missing_ok=True)
    return target


def _intact(target: Path) -> bool:
    """Whether the file is the one that was built here: the loader may crash on a damaged one."""
    try:
        return _seal(target).read_text(encoding="utf-8") == _digest(target)
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seal(target: Path) -> Path:
    return target.with_suffix(".sha256")
