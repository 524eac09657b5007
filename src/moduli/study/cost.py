"""What a tuned model costs: parameters, floating-point operations, memory.

Parameters and operations are those of the ordinary model: factors of LoRA are merged into the
weights in the end. A routed layer counts with the experts that a token uses, as if only they were
computed, whatever path computes it here (`moduli.surgery.report.LayerReport.cost`); how long it
really takes is another matter (`moduli bench`). Experts of models that came with their own are
not known to be experts. Letters: D width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from moduli.allocator import give_back
from moduli.surgery.convert import base_model
from moduli.surgery.evaluating import evaluating
from moduli.surgery.fast import chosen_share
from moduli.surgery.inputs import probe_batch
from moduli.surgery.locate import survey
from moduli.surgery.modular import dense, is_modular, routed_layers
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.projection import base_of, bias_of, shape_of
from moduli.surgery.report import ConversionReport
from moduli.surgery.routed import RoutedLayer
from moduli.surgery.stochastic import stochastic_projections

PROC = Path("/proc/self")


def measure_cost(
    model: nn.Module,
    conversion: ConversionReport | None = None,
    batch: Mapping[str, Any] | None = None,
) -> dict[str, int | float | None]:
    """Parameters and forward operations of a model, dense or converted, ready for training or not.

    Args:
        model: is run once, in evaluation mode with all its neurons; nothing in it changes.
        conversion: its report, which has the cost of its routed layers.
        batch: keyword arguments of its forward; None: a seeded random one. The operations of
            attention depend on how long the inputs are.

    Returns:
        "parameters"; "trainable_parameters", factors of LoRA among them; "active_parameters", of
        which a token uses those: all but the experts that were not chosen; "dense_flops_per_token"
        before conversion and "flops_per_token" now (a multiplication and an addition are two).
        The last two are None where it is not known what inputs the model takes.
    """
    parameters = sum(p.numel() for p in _ordinary(model))
    unused = sum(_unused_parameters(layer) for layer in routed_layers(model).values())
    for projection in stochastic_projections(model).values():
        count = len(projection.experts)
        unused += (1 - 1 / count) * sum(p.numel() for p in _ordinary(projection))
    found: dict[str, int | float | None] = {
        "parameters": parameters,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "active_parameters": round(parameters - unused),
        "dense_flops_per_token": None,
        "flops_per_token": None,
    }
    if batch is None:
        probe = probe_batch(base_model(model))
        batch = None if probe is None else probe[1]
    if batch is not None:
        total, positions = _run_counted(model, batch)
        tokens = max(positions.values(), default=0)
        if tokens > 0:
            saved = _saved(model, conversion, positions)
            found["dense_flops_per_token"] = total / tokens
            found["flops_per_token"] = (total - saved) / tokens
    return found


def _ordinary(module: nn.Module) -> Iterator[Tensor]:
    """Parameters without adapters, and without the copies that PEFT keeps beside trained ones."""
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if "original_module" not in parts and not any(p.startswith("lora_") for p in parts):
            yield parameter


def _unused_parameters(layer: RoutedLayer) -> float:
    """Parameters of the experts that a token does not use."""
    if isinstance(layer, OwnedExperts):
        experts = sum(p.numel() for p in _ordinary(layer.experts))
    else:
        experts = 0
        for path, projection in layer.ffn.projections.items():
            out, inputs = shape_of(projection)
            experts += out * inputs
            bias = bias_of(base_of(projection))
            if bias is not None and path != layer.ffn.family.last:
                experts += bias.numel()
        out_bias = getattr(layer, "out_bias", None)
        experts += 0 if out_bias is None else out_bias.numel()
    return (1 - chosen_share(layer)) * experts


def _saved(
    model: nn.Module, conversion: ConversionReport | None, positions: Mapping[str, int]
) -> float:
    """Operations of the dense FFNs that experts save; below 0 where they cost more."""
    if conversion is None:
        return 0.0
    saved = 0.0
    layers = routed_layers(model)
    for report in conversion.layers:
        layer = layers.get(report.name)
        if layer is None:  # stochastic experts compute what the dense FFN does
            continue
        matrices = 3 if layer.ffn.gated else 2
        hidden = layer.hidden if isinstance(layer, OwnedExperts) else layer.ffn.hidden
        flops = 2 * matrices * hidden * report.neurons
        saved += (1 - report.cost) * flops * positions.get(report.name, 0)
    return saved


@torch.no_grad()
def _run_counted(model: nn.Module, batch: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Operations of one dense forward pass, and positions that every FFN saw, by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    host, positions = base_model(model), {}
    watched = {ffn.name: ffn.first for ffn in survey(host)[0]}
    watched |= {name: layer.experts_input for name, layer in routed_layers(model).items()}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            positions[name] = args[0].numel() // args[0].shape[-1]

        return hook

    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for name, module in watched.items():
            stack.callback(module.register_forward_pre_hook(count(name)).remove)
        stack.enter_context(dense(host) if is_modular(host) else nullcontext())
        stack.enter_context(_without_adapter(model))
        # Fused attention is one operation that the counter does not know on every device.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(evaluating(model))
        stack.enter_context(counter)
        model(**batch)
    return counter.get_total_flops(), positions


def _without_adapter(model: nn.Module) -> Any:
    disable: Any = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()


class PeakMemory:
    """Peak memory while a block runs: `with PeakMemory() as memory: ...`, then `memory.peak`.

    On a CUDA device what torch allocated there, else what of the process was resident (Linux
    only). The peak is reset on entry, so blocks must not lie within each other.

    Attributes:
        peak: bytes; None before the block has ended, and where neither can be read.
    """

    peak: int | None = None

    def __enter__(self) -> Self:
        self._reset = _reset_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if torch.cuda.is_available():
            self.peak = int(torch.cuda.max_memory_allocated())
        elif self._reset:
            self.peak = _resident_peak()


def _reset_peak() -> bool:
    """Start a new peak; whether that was possible."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    give_back()  # freed memory that the allocator keeps would hide what the block needs
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    try:
        status = (PROC / "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None
