"""Where a run ran: versions, hardware, threads. Part of its record, and what `doctor` prints."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from moduli.version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy")
EXTRAS = {"lora": "peft", "gguf": "gguf"}


def versions() -> dict[str, str]:
    """Versions of Python, moduli and what it computes with."""
    found = {"python": platform.python_version(), "moduli": __version__}
    for package in PACKAGES:
        found[package] = metadata.version(package)
    return found


def extras() -> dict[str, str | None]:
    """Version of the package behind each optional extra, or None where it is not installed."""
    found: dict[str, str | None] = {}
    for extra, package in EXTRAS.items():
        try:
            found[extra] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[extra] = None
    return found


def hardware() -> dict[str, Any]:
    """Device that training would use, its name, threads, and whether bfloat16 pays."""
    import torch

    from moduli.allocator import malloc_is_tuned
    from moduli.training.settings import bf16_supported

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = str(torch.cpu.get_capabilities().get("cpu_name", "")) or platform.processor()
    return {
        "device": "cpu" if device is None else device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "bf16": bf16_supported(),
        "allocator": "keeps freed memory" if malloc_is_tuned() else "as the system has it",
        "system": f"{platform.system()} {platform.machine()}",
    }
