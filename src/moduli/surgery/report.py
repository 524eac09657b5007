"""What a conversion or a merge did to a model, as a record that prints itself.

Letters: F neurons, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moduli.surgery.partition.quality import SplitQuality


@dataclass(frozen=True)
class LayerReport:
    """One layer: sizes, split quality, output error at the chosen k, cost, path.

    Attributes:
        name: of the FFN's block.
        neurons: F.
        sizes: smallest and largest expert.
        quality: see `SplitQuality`; None where experts are no partition of the neurons.
        error: |y_routed - y_dense| / |y_dense - b2| over the tokens of the probe; None if not
            measured.
        cost: multiply-adds of the layer's FFN per token relative to the dense one, gate included.
        path: how the layer is computed.
    """

    name: str
    neurons: int
    sizes: tuple[int, int]
    quality: SplitQuality | None
    error: float | None
    cost: float
    path: str

    def to_dict(self) -> dict[str, Any]:
        quality = None if self.quality is None else self.quality.to_dict()
        return {**asdict(self), "sizes": list(self.sizes), "quality": quality}


@dataclass(frozen=True)
class ConversionReport:
    """All layers, and the settings that matter when reading them.

    Attributes:
        method: name of the method.
        num_experts: E.
        top_k: K.
        layers: one record each.
        total_ffns: FFNs in the model, converted or not.
        probe: what the output errors were measured on; empty if they were not.
        added_parameters: parameters that the method added (0 for EMoE).
        seconds: time that the conversion took.
        skipped: blocks that resemble an FFN but could not be used, with the reason.
    """

    method: str
    num_experts: int
    top_k: int
    layers: Sequence[LayerReport]
    total_ffns: int
    probe: str
    added_parameters: int
    seconds: float
    skipped: Sequence[tuple[str, str]] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["layers"] = [layer.to_dict() for layer in self.layers]
        data["skipped"] = [list(pair) for pair in self.skipped]
        return data

    def __str__(self) -> str:
        head = (
            f"{self.method}: {len(self.layers)} of {self.total_ffns} FFNs split into "
            f"{self.num_experts} experts, {self.top_k} per token; "
            f"{self.added_parameters:,} parameters added ({self.seconds:.1f} s)"
        )
        columns = ("layer", "neurons", "expert size", "explained", "output error", "cost", "path")
        body = [
            (
                layer.name,
                str(layer.neurons),
                _span(layer.sizes),
                "-" if layer.quality is None else f"{layer.quality.share:.1%}",
                "-" if layer.error is None else f"{layer.error:.3f}",
                f"{layer.cost:.2f}",
                layer.path,
            )
            for layer in self.layers
        ]
        lines = [head, *_table(columns, body)]
        if self.probe:
            lines.append(f"Output error: relative to the dense FFN, on {self.probe}.")
        lines.append("Explained: share of the spread of the keys that lies between experts.")
        lines += [f"Not used: {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class MergeReport:
    """What `moduli.merge` did.

    Attributes:
        layers: names of the layers that are dense again.
        exact: whether the merged weights are the trained ones, only moved (no averaging).
        averaged: what had to be averaged, by layer.
    """

    layers: Sequence[str]
    exact: bool
    averaged: Sequence[str] = ()

    def __str__(self) -> str:
        text = f"merged {len(self.layers)} layers back to dense"
        if self.exact:
            return f"{text}; weights were moved, none was averaged"
        return f"{text}; averaged: {', '.join(self.averaged)}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _span(sizes: tuple[int, int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]}-{sizes[1]}"


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [columns, *body]) for i in range(len(columns))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [columns, *body]
    ]
