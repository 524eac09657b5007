"""`moduli doctor`: what a bug report needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Versions, hardware, kernels, cache and extras: what a bug report needs."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("doctor", Doctor, argv)
    from moduli.cli.output import Output, table
    from moduli.data import cache_dir, fetchable
    from moduli.experts.kernels import KERNELS
    from moduli.methods.registry import method_names
    from moduli.study.environment import extras, hardware, versions

    output = Output(args.json)
    cache = cache_dir()
    cached = [name for name in fetchable() if (cache / name).is_dir()]
    data = {
        "versions": versions(),
        "hardware": hardware(),
        "kernels": sorted(KERNELS),
        "methods": method_names(),
        "extras": extras(),
        "cache": {"directory": str(cache), "holds": cached},
    }
    output.data(data)
    rows: list[tuple[str, str]] = [*versions().items()]
    rows += [(name, _word(value)) for name, value in hardware().items()]
    rows += [("kernels", ", ".join(sorted(KERNELS))), ("methods", ", ".join(method_names()))]
    for name, version in extras().items():
        rows.append((f"extra {name}", version or f"not installed: pip install 'moduli[{name}]'"))
    rows += [("cache", str(cache)), ("cached", ", ".join(cached) or "nothing yet")]
    output.text(table(("", ""), rows, text=2))
    return 0


def _word(value: object) -> str:
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )
