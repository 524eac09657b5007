"""The C++ kernel is compiled once, by whoever comes first, and its absence has a reason."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moduli.experts.kernels import build, native
from tests.experts.random_layers import Case
from tests.experts.random_layers import build as built

Load = Callable[[], object]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """`build.library` without what this process already knows, and with an empty cache."""
    monkeypatch.setenv("MODULI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(build.OFF, raising=False)
    found: Load = build.library.__wrapped__
    return found


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled kernel of this machine."""
    found = build.library()
    if isinstance(found, str):
        pytest.skip(found)
    return Path(found._name)


def compiler(directory: Path, body: str) -> Path:
    """A script that is found as `g++`, with its --version answered."""
    script = directory / "g++"
    version = '[ "$1" = --version ] && echo "stand-in 1.0" && exit 0\n'
    script.write_text(f"#!/bin/sh\n{version}{body}\n")
    script.chmod(0o755)
    return script


def copying(directory: Path, real: Path) -> Path:
    """A compiler that counts its calls in `calls` and has everything ready."""
    body = f"""echo "$@" >> {directory}/calls
for last; do :; done
[ "$1" = -shared ] && cp {real} "$last"
exit 0"""
    compiler(directory, body)
    return directory / "calls"


def links(calls: Path) -> int:
    return sum(line.startswith("-shared") for line in calls.read_text().splitlines())


def test_without_a_compiler_there_is_a_reason_and_one_line(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, logger=build.__name__):
        assert load() == "there is no C++ compiler"
    (record,) = caplog.records
    assert "there is no C++ compiler" in record.getMessage()


def test_layers_are_computed_without_it_and_it_is_mentioned_once(tmp_path: Path) -> None:
    """In a process of its own: no compiler, and the kernel is chosen automatically."""
    program = """
import logging, os
logging.basicConfig(level=logging.WARNING, format="%(message)s")
os.environ["PATH"] = ""
from tests.experts.random_layers import Case, build, gradients
from moduli.experts.kernels.build import library
for tokens in (1, 9):
    for _ in range(2):
        gradients(build(Case(tokens=tokens)), "loop")
        library()
from moduli.errors import ConfigError
try:
    build(Case()).run("native")
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True,
        env=os.environ | {"MODULI_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert "there is no C++ compiler" in done.stdout
    assert done.stderr.count("no C++ expert kernel") == 1, done.stderr


def test_switched_off(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.OFF, "0")
    assert load() == "switched off by MODULI_NATIVE=0"


@pytest.mark.parametrize("unset", ["", "1"])
def test_other_values_leave_it_on(
    load: Load, real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unset: str
) -> None:
    copying(tmp_path, real)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv(build.OFF, unset)
    assert not isinstance(load(), str)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo 'native.cpp:1: no such register' >&2; exit 1", "no such register"),
        ("exit 1", "failed"),
        ("exit 0", "failed"),  # says it worked, but leaves nothing
        ("for last; do :; done; echo nonsense > $last", "failed"),  # leaves what is no library
    ],
)
def test_a_compiler_that_fails_is_a_reason(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, why: str
) -> None:
    compiler(tmp_path, body)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reason = load()
    assert isinstance(reason, str)
    assert why in reason
    assert "\n" not in reason
    left = {path.suffix for path in (tmp_path / "cache" / "machine").iterdir()}
    assert not left & {".partial", ".o"}


def test_a_cache_that_cannot_be_written_is_a_reason(
    load: Load, real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copying(tmp_path, real)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert isinstance(load(), str)


def test_it_is_compiled_once(
    load: Load, real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = copying(tmp_path, real)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for _ in range(3):
        assert not isinstance(load(), str)
    assert links(calls) == 1
    (tmp_path / "g++").write_text((tmp_path / "g++").read_text().replace("1.0", "2.0"))
    assert not isinstance(load(), str)
    assert links(calls) == 2  # another compiler


@pytest.mark.parametrize("damage", ["empty", "text", "half", "no symbols", "flipped"])
def test_a_damaged_library_is_compiled_again(
    load: Load, real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    calls = copying(tmp_path, real)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not isinstance(load(), str)
    (target,) = (tmp_path / "cache" / "machine").glob("*.so")
    content = real.read_bytes()
    target.unlink()  # what is loaded stays as it is
    target.write_bytes(
        {
            "empty": b"",
            "text": b"not a library",
            "half": content[: len(content) // 2],
            "no symbols": content.replace(b"moduli_forward", b"moduli_sideway"),
            "flipped": content[:4000] + bytes(4000) + content[8000:],
        }[damage]
    )
    assert not isinstance(load(), str)
    assert links(calls) == 2
    assert target.read_bytes() == content


PROCESS = """
import sys
from moduli.experts.kernels import build
build.FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS)
found = build.library()
assert not isinstance(found, str), found
print(found._name)
"""


@pytest.mark.slow
def test_processes_that_start_together_share_one_build(real: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"MODULI_CACHE": str(tmp_path)},
        )
        for _ in range(2)
    ]  # fmt: skip
    done = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], done
    assert done[0][0] == done[1][0]
    assert sum(err.count("compiling") for _, err in done) == 1
    assert sorted(p.suffix for p in (tmp_path / "machine").iterdir()) == [".lock", ".sha256", ".so"]


ARCHITECTURE = """
import sys
from moduli.experts.kernels import build
lanes, march = int(sys.argv[1]), sys.argv[2]
build.FLAGS = tuple(
    f"-march={march}" if flag.startswith("-march") else flag for flag in build.FLAGS
)
found = build.library()
assert not isinstance(found, str), found
assert found.moduli_lanes() == lanes
import pytest
sys.exit(pytest.main([
    "-q", "-x", "-p", "no:cacheprovider", "-k", "native", "-m", "slow or not slow",
    "tests/experts/test_kernel_properties.py", "tests/experts/test_kernels.py",
    "tests/experts/test_activations.py",
]))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="not an x86 CPU")
@pytest.mark.parametrize(("lanes", "march"), [(8, "x86-64-v3"), (4, "x86-64-v2")])
def test_processors_with_narrower_vectors(
    real: Path, tmp_path: Path, lanes: int, march: str
) -> None:
    """All tests of the kernel, compiled for older processors."""
    done = subprocess.run(
        [sys.executable, "-c", ARCHITECTURE, str(lanes), march],
        capture_output=True, text=True, timeout=1800, check=False,
        cwd=Path(__file__).parents[2], env=os.environ | {"MODULI_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_it_refuses_what_it_cannot_read() -> None:
    layer = built(Case(), torch.float64)
    assert "float64" in str(native.refuses(layer.x(), layer.experts()))
    odd = built(Case(width=7, activation=F.gelu), torch.bfloat16)
    assert native.refuses(odd.x(), odd.experts()) is not None  # odd, or no bfloat16, or no compiler
