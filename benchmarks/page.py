"""Writes docs/performance.md and its figures from the records in benchmarks/results/bench.

moduli bench --set acceptance --out benchmarks/results/bench
python benchmarks/page.py
"""

from __future__ import annotations

from pathlib import Path

from moduli.bench.page import render_figures, render_page
from moduli.bench.records import read_record

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    records = [
        read_record(path) for path in sorted((ROOT / "benchmarks/results/bench").glob("*.json"))
    ]
    docs = ROOT / "docs"
    (docs / "performance.md").write_text(render_page(records), encoding="utf-8")
    for name, svg in render_figures(records).items():
        (docs / name).write_text(svg, encoding="utf-8")
    print(f"docs/performance.md: {len(records)} records")


if __name__ == "__main__":
    main()
