"""`moduli methods`: what there is and what can be set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Methods(Common):
    """The methods, or the settings of the named ones with their defaults.

    examples:
      moduli methods
      moduli methods emoe
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Methods to show the settings of."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("methods", Methods, argv)
    from moduli.cli.output import Output, table
    from moduli.methods.registry import get_method, method_names

    output = Output(args.json)
    chosen = [get_method(name) for name in args.names or method_names()]
    described: list[dict[str, Any]] = [
        {
            "name": cls.name,
            "summary": cls.summary,
            "modular": cls.modular,
            "settings": cls().to_dict(),
        }
        for cls in chosen
    ]
    output.data({"methods": described})
    if not args.names:
        output.text(
            table(("method", "what it does"), [(c.name, c.summary) for c in chosen], text=2)
        )
        return 0
    for cls in chosen:
        output.text(f"{cls.name}: {cls.summary}")
        rows = [(f.name, str(f.type), repr(f.default)) for f in dataclasses.fields(cls)]
        output.text(table(("setting", "type", "default"), rows, text=3), "")
    output.text(f"moduli tune {chosen[0].name} --help explains each setting")
    return 0
