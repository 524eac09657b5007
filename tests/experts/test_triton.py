"""The Triton kernel: what it refuses, and what it computes where Triton can be imported.

`make test-all` runs this file with Triton beside the environment, since its interpreter needs no
GPU; `triton_worker` says what is compared.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moduli.errors import ConfigError
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import KERNELS, Between, choose, run_experts
from moduli.routing import Routing

ROOT = Path(__file__).resolve().parents[2]
T, D, E, e, K = 8, 16, 4, 8, 2
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def layer(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Routing, StackedFFN]:
    x, first, second = (torch.randn(*s).to(dtype) for s in ((T, D), (E, e, D), (E, e, D)))
    index = torch.rand(T, E).topk(K).indices
    return x, Routing(index, torch.rand(T, K).to(dtype)), StackedFFN(first, second, (e,) * E)


def reason(
    experts: StackedFFN, x: torch.Tensor, between: Between, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Why these experts are refused by a process that could run the kernel otherwise."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("moduli.experts.kernels.fused.find_spec", lambda name: name)
    found = KERNELS["triton"].refuses(x, experts, between)
    monkeypatch.undo()
    assert found is not None
    return found


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moduli.experts.kernels.fused.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package triton is not installed"):
        run_experts(*layer(), F.gelu, "triton")


def test_on_cpu_it_names_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("moduli.experts.kernels.fused.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"not compile for cpu.*TRITON_INTERPRET=1"):
        run_experts(*layer(), F.gelu, "triton")


def test_what_else_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, experts = layer()
    packed = replace(
        experts,
        first=experts.first.flatten(0, 1),
        second=experts.second.flatten(0, 1),
        sizes=(e - 1, e + 1, *experts.sizes[2:]),
    )
    usual = Between(F.gelu)
    cases = [
        (packed, x, usual, "differ in size"),
        (layer(torch.float64)[2], x.double(), usual, "these are torch.float64"),
        (layer(torch.bfloat16)[2], x.bfloat16(), usual, "interpreter has no products"),
        (experts, x.half(), usual, "tokens are torch.float16 and first is torch.float32"),
        (experts, x, Between(torch.tanh), "does not know the derivative of the activation tanh"),
        (experts, x, Between(F.gelu, after=torch.neg), "applied to the outputs"),
    ]
    for given, tokens, between, words in cases:
        assert words in reason(given, tokens, between, monkeypatch)


def test_it_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("moduli.experts.kernels.fused.find_spec", lambda name: name)
    x, routing, experts = layer()
    assert KERNELS["triton"].refuses(x, experts, Between(F.gelu)) is None
    assert choose(x, routing, experts, Between(F.gelu)) != "triton"


def worker(what: str, cache: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(what == "interpret"))}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.experts.triton_worker", what]
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
