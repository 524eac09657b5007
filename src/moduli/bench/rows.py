"""What a measurement says: one row per case and settings, made of entries, all plain data.

Everything that is compared is a ratio to something measured in the same process. Letters: T
tokens, E experts, K experts per token, S = T K routed rows, e neurons of an expert, b bytes of a
number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from moduli.bench.cases import LayerCase
from moduli.bench.protocol import ENOUGH, Timing
from moduli.bench.settings import Settings

COMPILED = "native"  # the kernel that needs a compiler; figures are given with and without it


@dataclass(frozen=True)
class Entry:
    """A candidate's result.

    Attributes:
        role: "kernel" (ours), "dense" (a form of the dense layer) or "peer" (transformers).
        ms: median of a call of one layer in milliseconds; None where there is none.
        min_ms: the least of them.
        clean: samples that count.
        samples: samples that were taken.
        error: deviation from the reference relative to its largest entry.
        saved_bytes: kept for backward beyond weights and tokens; None in forward mode.
        note: why there is no time.
    """

    name: str
    role: str
    ms: float | None = None
    min_ms: float | None = None
    clean: int = 0
    samples: int = 0
    error: float | None = None
    saved_bytes: int | None = None
    note: str | None = None

    def timed(self, timing: Timing) -> Entry:
        """The entry with its time."""
        return replace(
            self, ms=timing.median, min_ms=timing.min, clean=timing.clean, samples=timing.samples
        )

    @property
    def thin(self) -> bool:
        """Whether the time rests on too few clean samples."""
        return self.ms is not None and self.clean < ENOUGH


@dataclass(frozen=True)
class LayerRow:
    """A case measured under one of the settings.

    Attributes:
        choice: the kernel that "auto" took.
        router_ms: gate and top-k.
        dense_share: K of so many experts of the dense layer: the floor as a part of its time.
        machine_floor_ms: see `moduli.bench.layer.machine_floor`.
        peak_gflops: GEMM rate of the machine.
    """

    case: LayerCase
    settings: Settings
    device: str
    entries: tuple[Entry, ...]
    choice: str | None
    router_ms: float
    dense_share: float
    machine_floor_ms: float
    peak_gflops: float

    def entry(self, name: str) -> Entry | None:
        """The entry of a candidate, or None where it did not take part."""
        return next((e for e in self.entries if e.name == name), None)

    def ms(self, name: str) -> float | None:
        """Median time of a candidate, or None."""
        entry = self.entry(name)
        return None if entry is None else entry.ms

    @property
    def floor_ms(self) -> float | None:
        """K / E of the fastest dense form; for one token, reading the weights of its experts."""
        if self.case.decode:
            return self.machine_floor_ms
        dense = self.best_dense
        return None if dense is None or dense.ms is None else self.dense_share * dense.ms

    @property
    def best_dense(self) -> Entry | None:
        """The fastest form of the dense layer."""
        return _fastest(e for e in self.entries if e.role == "dense")

    @property
    def best_peer(self) -> Entry | None:
        """The fastest of transformers' backends and the dense forms.

        Where experts are owned there is no dense layer of the same function, only backends.
        """
        roles = ("peer",) if self.case.owned else ("peer", "dense")
        return _fastest(e for e in self.entries if e.role in roles)

    @property
    def best_kernel(self) -> Entry | None:
        """The fastest of our kernels when forced."""
        return _fastest(e for e in self.entries if e.role == "kernel" and e.name != "auto")

    @property
    def best_interpreted(self) -> Entry | None:
        """The fastest of our kernels that need no compiler."""
        skipped = ("auto", COMPILED)
        return _fastest(e for e in self.entries if e.role == "kernel" and e.name not in skipped)

    def to_floor(self, entry: Entry | None) -> float | None:
        """Time over floor."""
        return _over(None if entry is None else entry.ms, self.floor_ms)

    def ahead(self, entry: Entry | None) -> float | None:
        """How many times as fast as the best peer."""
        peer = self.best_peer
        return _over(None if peer is None else peer.ms, None if entry is None else entry.ms)

    def to_dense(self, entry: Entry | None) -> float | None:
        """Time over that of the fastest dense form of the same function."""
        if self.case.owned:
            return None
        dense = self.best_dense
        return _over(None if entry is None else entry.ms, None if dense is None else dense.ms)

    def of_peak(self, entry: Entry | None) -> float | None:
        """Share of the machine's GEMM rate."""
        if entry is None or entry.ms is None:
            return None
        return self.case.flops / (entry.ms / 1000) / 1e9 / self.peak_gflops

    def saved(self, entry: Entry | None) -> float | None:
        """Bytes kept for backward over S e b, or twice that for gated experts."""
        case = self.case
        once = case.rows * case.width * case.torch_dtype.itemsize * (case.matrices - 1)
        return None if entry is None or entry.saved_bytes is None else entry.saved_bytes / once

    @property
    def router_share(self) -> float | None:
        """Gate and top-k as a share of the routed layer."""
        ms = self.ms("auto")
        return None if ms is None else self.router_ms / (self.router_ms + ms)

    @property
    def regret(self) -> float | None:
        """Time of "auto" over that of the best kernel."""
        best = self.best_kernel
        return _over(self.ms("auto"), None if best is None else best.ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what was measured, and the ratios that follow from it."""
        found = asdict(self)
        for entry, data in zip(self.entries, found["entries"], strict=True):
            data["ratio_to_floor"] = self.to_floor(entry)
            data["times_best_peer"] = self.ahead(entry)
            data["share_of_peak"] = None if entry.role == "dense" else self.of_peak(entry)
        peer = self.best_peer
        return {
            **found,
            "label": self.case.label,
            "floor_ms": self.floor_ms,
            "best_peer": None if peer is None else peer.name,
            "router_share": self.router_share,
            "regret": self.regret,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerRow:
        """The inverse of `to_dict`; ratios are derived anew."""
        names = Entry.__dataclass_fields__
        entries = [{k: v for k, v in e.items() if k in names} for e in data["entries"]]
        kept = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        return cls(
            **{
                **kept,
                "case": LayerCase(**data["case"]),
                "entries": tuple(Entry(**e) for e in entries),
            }
        )


def _fastest(entries: Iterable[Entry]) -> Entry | None:
    timed = [e for e in entries if e.ms is not None]
    return min(timed, key=lambda e: e.ms or 0.0, default=None)


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b
