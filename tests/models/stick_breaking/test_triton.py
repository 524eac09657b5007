"""The Triton kernels: what they refuse, and what they compute where Triton can be imported.

`triton_worker` says what is compared; the interpreter needs no GPU.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moduli.errors import ConfigError
from moduli.models.stick_breaking import stick_breaking_attention, triton

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def rows(dtype: torch.dtype = torch.float32, width: int = 4) -> torch.Tensor:
    return torch.randn(1, 2, 5, width).to(dtype)


@pytest.fixture
def could(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were installed."""
    monkeypatch.setattr(triton, "find_spec", lambda name: name)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    x = rows()
    with pytest.raises(ConfigError, match=r"the package triton is not installed.*'auto'"):
        stick_breaking_attention(x, x, x, backend="triton")


def test_on_cpu_it_names_the_interpreter(could: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = rows()
    with pytest.raises(ConfigError, match=r"not compile for cpu.*TRITON_INTERPRET=1"):
        stick_breaking_attention(x, x, x, backend="triton")


def test_what_else_it_refuses(could: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    half = rows(torch.half)
    for tensors, words in [
        ((rows(torch.bfloat16),) * 3, "interpreter has no products"),
        ((rows(torch.double),) * 3, "these are torch.float64"),
        ((half, half, rows()), "torch.float16, torch.float16, torch.float32"),
    ]:
        reason = triton.refuses(*tensors)
        assert reason is not None
        assert words in reason


def test_the_interpreter_is_never_chosen(could: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "forward", lambda *_: pytest.fail("chosen"))
    x = rows()
    assert triton.refuses(x, x, x) is None
    stick_breaking_attention(x, x, x)


def worker(what: str, cache: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(what == "interpret"))}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.models.stick_breaking.triton_worker", what]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("what", ["interpret", "compile"])
def test_without_a_gpu(what: str, tmp_path: Path) -> None:
    worker(what, tmp_path)


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu(tmp_path: Path) -> None:
    worker("cuda", tmp_path)
