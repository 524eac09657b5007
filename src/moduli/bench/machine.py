"""The machine line: what ran, and how fast the machine is at what every layer is made of.

A matrix product and two passes over memory, measured in the process whose other figures are held
against them; never constants. Floors follow from these rates and from the dense layer.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moduli.allocator import malloc_is_tuned
from moduli.bench.protocol import Clock, measure
from moduli.bench.settings import Settings, scope
from moduli.experts.kernels.precision import fp32_is_safe, measured_precision
from moduli.version import __version__

# Large enough for the peak on any CPU and most of it on a GPU; larger than any cache.
GEMM_CPU, GEMM_ACCELERATOR = 1024, 8192
STREAM_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Machine:
    """Where and how a process ran.

    Attributes:
        processor: model of the CPU or the GPU.
        isa: widest instruction set that torch uses, or the GPU's compute capability.
        threads: threads of this process.
        cores: CPU cores there are.
        wait_policy: how OpenMP threads wait for each other.
        allocator: whether it keeps freed memory.
        fp32: which library computes float32 products.
        settings: see `moduli.bench.settings`.
        load: load average over a minute when the process began.
        gemm: rate of a matrix product by dtype, GFLOP/s.
        copy: bytes read and written per second, in GB/s.
        read: bytes read per second, in GB/s.
    """

    processor: str
    isa: str
    device: str
    threads: int
    cores: int
    system: str
    versions: dict[str, str]
    wait_policy: str
    allocator: str
    fp32: str
    settings: Settings
    load: float
    gemm: dict[str, float]
    copy: float
    read: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect_machine(settings: Settings, device: torch.device, *, quick: bool = False) -> Machine:
    """Describe the machine and measure its rates.

    Args:
        settings: what this process runs under.
        device: where layers run.
        quick: smaller arrays, for tests; the rates then mean little.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    threads = torch.get_num_threads()
    clock = Clock.of(device, threads)
    with scope(settings, device):
        rates = measure_rates(device, clock, shrink=16 if quick else 1)
    return Machine(
        processor=processor(device),
        isa=isa(device),
        device=device.type,
        threads=threads,
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        versions={
            "python": platform.python_version(),
            "moduli": __version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        wait_policy=os.environ.get("OMP_WAIT_POLICY", "default"),
        fp32=_fp32(settings, device),
        allocator=_allocator(),
        settings=settings,
        load=round(load, 2),
        **rates,
    )


def measure_rates(device: torch.device, clock: Clock, *, shrink: int = 1) -> dict[str, Any]:
    """GEMM rate by dtype, copy rate and read rate, in the units of `Machine`."""
    n = (GEMM_CPU if device.type == "cpu" else GEMM_ACCELERATOR) // shrink
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls[str(dtype).removeprefix("torch.")] = _product(a, b, out)
    source = torch.ones(STREAM_BYTES // 4 // shrink, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    calls["read"] = lambda: source.sum()
    found = measure(calls, clock, rng=random.Random(0))
    seconds = {name: timing.min / 1000 for name, timing in found.items()}
    size = source.nbytes / 1e9
    return {
        "gemm": {d: round(2 * n**3 / seconds[d] / 1e9, 1) for d in ("float32", "bfloat16")},
        "copy": round(2 * size / seconds["copy"], 2),
        "read": round(size / seconds["read"], 2),
    }


def processor(device: torch.device) -> str:
    """The model of the CPU or GPU, as its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def isa(device: torch.device) -> str:
    """What torch's kernels are built for here."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    found = [torch.backends.cpu.get_cpu_capability()]
    capable = torch.cpu.get_capabilities()
    found += [name for name in ("avx512_bf16", "amx_bf16", "sve_bf16") if capable.get(name)]
    return " ".join(found)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=out)


def _allocator() -> str:
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    names = [Path(name).name for name in preloaded] or [platform.libc_ver()[0] or "system"]
    return f"{' '.join(names)}, {'keeps freed memory' if malloc_is_tuned() else 'untouched'}"


def _fp32(settings: Settings, device: torch.device) -> str:
    if device.type != "cpu":
        return "as torch has it"
    error, gain = measured_precision()
    how = "fast for all" if settings == "tuned" and fp32_is_safe() else "as torch has it"
    return f"{how}; the fast library is {gain:.2f} times as fast with an error of {error:.1e}"
