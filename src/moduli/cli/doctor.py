"""`moduli doctor`: what a bug report needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from moduli.cli.options import Common, parse

if TYPE_CHECKING:
    from moduli.experts.kernels.status import Status


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Versions, hardware, kernels, cache and extras: what a bug report needs.

    Attributes:
        measure: Measure the kernels again, for example if the machine was busy when it was done.
    """

    measure: bool = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("doctor", Doctor, argv)
    from moduli.cli.output import Output, table
    from moduli.data import cache_dir, fetchable
    from moduli.experts.kernels import KERNELS
    from moduli.experts.kernels.status import status
    from moduli.methods.registry import method_names
    from moduli.study.environment import extras, hardware, versions

    output = Output(args.json)
    cache = cache_dir()
    cached = [name for name in fetchable() if (cache / name).is_dir()]
    kernels = status(measure_again=args.measure)
    data = {
        "versions": versions(),
        "hardware": hardware(),
        "kernels": {name: kernel.summary for name, kernel in KERNELS.items()},
        "kernels here": asdict(kernels),
        "methods": method_names(),
        "extras": extras(),
        "cache": {"directory": str(cache), "holds": cached},
    }
    output.data(data)
    rows: list[tuple[str, str]] = [*versions().items()]
    rows += [(name, _word(value)) for name, value in hardware().items()]
    rows += [("methods", ", ".join(method_names()))]
    fast = f"error {kernels.fp32_error:.0e}, {kernels.fp32_gain:.2f} x as fast"
    rows += [
        ("kernels", ", ".join(sorted(KERNELS))),
        ("C++ kernel", kernels.native + _extra(kernels)),
        ("fast float32", f"{_word(kernels.fast_fp32)} ({fast})"),
        ("measured in", kernels.calibration),
    ]
    for name, version in extras().items():
        rows.append((f"extra {name}", version or f"not installed: pip install 'moduli[{name}]'"))
    rows += [("cache", str(cache)), ("cached", ", ".join(cached) or "nothing yet")]
    output.text(table(("", ""), rows, text=2))
    output.text("What kernel='auto' takes for layers of 4 D neurons:")
    columns = ("D", "E", "K", "tokens", "numbers", "kernel")
    output.text(
        table(
            columns,
            [
                (
                    str(c.width), str(c.experts), str(c.top_k), str(c.tokens), c.dtype,
                    c.kernel,
                )
                for c in kernels.choices
            ],
            text=6,
        )
    )  # fmt: skip
    return 0


def _extra(kernels: Status) -> str:
    if kernels.native != "compiled":
        return ""
    return ", float32 and bfloat16" if kernels.native_bf16 else ", float32"


def _word(value: object) -> str:
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )
