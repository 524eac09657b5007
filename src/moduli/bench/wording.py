"""Rows in words: the cells of tables for the terminal and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moduli.bench.cases import LayerCase
from moduli.bench.models import ModelRow
from moduli.bench.rows import Entry, LayerRow
from moduli.bench.targets import Check, checks

Cells = tuple[str, ...]
MISSING = "–"

LEGEND = (
    "floor: K/E of the fastest dense form, or for one token reading the experts' weights. "
    "peer: times as fast as the best of transformers' backends and dense. "
    "dense: time over the fastest dense form. best (regret): time over our best kernel. "
    "saved: bytes for backward over S·e·b. router: share of gate and top-k. "
    "~: fewer than 3 clean samples."
)


def short(case: LayerCase) -> str:
    """A case in few words: "4096 768 16/4 fp32 train x2" on two threads."""
    kind = "fp32" if case.dtype == "float32" else "bf16"
    mode = "fwd" if case.mode == "forward" else "train"
    words = [f"{case.tokens} {case.hidden} {case.experts}/{case.top_k}", kind, mode]
    words += ["gated"] if case.gated else []
    words += ["owned"] if case.owned and not case.title else []
    words += ["skewed"] if case.spread == "skewed" else []
    words += [f"x{case.threads}"] if case.threads > 1 else []
    return " ".join([case.title, *words] if case.title else words)


def summary(rows: Sequence[LayerRow], *, wide: bool = False) -> tuple[Cells, list[Cells]]:
    """One line per case: what "auto" reaches, beside the target where there is one.

    Args:
        rows: of one process.
        wide: with the best peer and the share of peak, too wide for a terminal.

    Returns:
        Titles and cells; columns that say nothing here are left out.
    """
    lines: list[dict[str, str]] = []
    for row in rows:
        auto, found, peer = row.entry("auto"), checks(row), row.best_peer
        by = {check.what: check for check in found}
        thin = "~" if auto is not None and auto.thin else ""
        missed = [check.what for check in found if not check.met]
        line = {
            "T D E/K": short(row.case),
            "auto": (row.choice or MISSING) + thin,
            "floor": _against(row.to_floor(auto), by.get("floor")),
            "peer": _against(row.ahead(auto), by.get("peer")),
            "best peer": MISSING if peer is None else peer.name.removeprefix("transformers "),
            "dense": number(row.to_dense(auto)),
            "best": number(row.regret),
            "peak": percent(row.of_peak(auto)),
            "saved": number(row.saved(auto)),
            "router": percent(row.router_share),
            "met": MISSING if not found else _verdict(missed),
        }
        if not wide:
            del line["best peer"], line["peak"]
        lines.append(line)
    used = [title for title in lines[0] if any(line[title] != MISSING for line in lines)]
    return tuple(used), [tuple(line[title] for title in used) for line in lines]


def details(row: LayerRow) -> tuple[Cells, list[Cells]]:
    """One line per candidate of a case, the fastest first, those without a time last."""
    columns = ("", "ms", "min", "clean", "floor", "peer", "peak", "saved", "note")
    body: list[Cells] = [
        (
            entry.name,
            _ms(entry.ms),
            _ms(entry.min_ms),
            f"{entry.clean}/{entry.samples}",
            number(row.to_floor(entry)),
            number(row.ahead(entry)),
            percent(row.of_peak(entry)) if entry.role != "dense" else MISSING,
            number(row.saved(entry)),
            entry.note or "",
        )
        for entry in sorted(row.entries, key=_time)
    ]
    return columns, body


def heading(row: LayerRow) -> str:
    """What stands above the details of a case."""
    return (
        f"{row.case.label}, {row.settings}: floor {_ms(row.floor_ms)} ms, "
        f"auto takes {row.choice}, router {percent(row.router_share)} of the layer"
    )


def compiled(rows: Sequence[LayerRow]) -> tuple[Cells, list[Cells]]:
    """Time over floor with the compiled kernel and without, for cases that have both."""
    body: list[Cells] = [
        (
            short(row.case),
            number(row.to_floor(row.entry("native"))),
            number(row.to_floor(row.best_interpreted)),
        )
        for row in rows
        if row.ms("native") is not None
    ]
    return ("T D E/K", "compiled", "without"), body


def model_table(rows: Sequence[ModelRow], *, rates: bool = True) -> tuple[Cells, list[Cells]]:
    """One line per model, task and settings; without `rates`, what holds elsewhere too."""
    columns: Cells = ("", "settings", "dense tokens/s", "emoe tokens/s", "emoe / dense")
    body: list[Cells] = [
        (
            row.case.label,
            row.settings,
            _rate(row.per_second("dense")),
            _rate(row.per_second("emoe")),
            number(row.speedup) + ("~" if any(e.thin for e in row.entries) else ""),
        )
        for row in rows
    ]
    if not rates:
        columns, body = (*columns[:2], columns[4]), [(*line[:2], line[4]) for line in body]
    return columns, body


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine of a process in one line."""
    gemm = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in machine["gemm"].items())
    versions = machine["versions"]
    return (
        f"{machine['processor']} ({machine['isa']}), {machine['threads']} of {machine['cores']} "
        f"cores; torch {versions['torch']}, transformers {versions['transformers']}; allocator: "
        f"{machine['allocator']}; float32: {machine['fp32']}; OpenMP waits: "
        f"{machine['wait_policy']}; GEMM {gemm} GFLOP/s; copy {machine['copy']:.0f}, read "
        f"{machine['read']:.0f} GB/s; load {machine['load']:.1f}"
    )


def number(value: float | None) -> str:
    """A ratio."""
    return MISSING if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share."""
    return MISSING if value is None else f"{100 * value:.0f} %"


def _ms(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _rate(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _time(entry: Entry) -> float:
    return float("inf") if entry.ms is None else entry.ms


def _verdict(missed: Sequence[str]) -> str:
    """Yes, or what is missed; floor and peer stand beside their targets already."""
    if not missed:
        return "yes"
    return f"no {' '.join(name for name in missed if name not in ('floor', 'peer'))}".rstrip()


def _against(value: float | None, check: Check | None) -> str:
    """A ratio and, where there is a target, which side of it the ratio is on."""
    if check is None or value is None:
        return number(value)
    signs = ("≤", ">") if check.at_most else ("≥", "<")
    return f"{number(value)}{signs[not check.met]}{check.limit:g}"
