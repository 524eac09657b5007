"""What the kernels are to reach: shapes with the ratios that count, and whether a row meets them.

Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from moduli.bench.cases import LayerCase
from moduli.bench.rows import COMPILED, LayerRow

SAVED = 1.2
ROUTER = 0.10
# For every shape: "auto" over the best of our kernels, and over the fastest dense form.
REGRET = 1.10
DENSE = 1.05
# Time of the compiled kernel over floor, by neurons of an expert.
WIDE, COMPILED_WIDE, NARROW, COMPILED_NARROW = 96, 1.35, 24, 2.0


@dataclass(frozen=True)
class Target:
    """Ratios for one or more shapes.

    Attributes:
        title: the shapes in words.
        shapes: cases in forward mode.
        forward: largest time over floor.
        train: the same for forward and backward, or None where only forward counts.
        ahead: least times as fast as the best tuned peer.
        faster_than_dense: whether dense has to be beaten as well.
    """

    title: str
    shapes: tuple[LayerCase, ...]
    forward: float
    train: float | None
    ahead: float
    faster_than_dense: bool = False
    cases: tuple[LayerCase, ...] = field(init=False)

    def __post_init__(self) -> None:
        both = [self.shapes]
        if self.train is not None:
            both.append(tuple(replace(case, mode="train") for case in self.shapes))
        object.__setattr__(self, "cases", tuple(case for cases in both for case in cases))


def _shapes(
    tokens: tuple[int, ...],
    hidden: tuple[int, ...],
    experts: int,
    top_k: tuple[int, ...],
    threads: tuple[int, ...] = (1,),
    **more: str,
) -> tuple[LayerCase, ...]:
    return tuple(
        LayerCase(tokens=t, hidden=d, experts=experts, top_k=k, threads=n, **more)  # type: ignore[arg-type]
        for n in threads
        for t in tokens
        for d in hidden
        for k in top_k
    )


TARGETS = (
    Target("wide experts", _shapes((4096,), (768,), 16, (4,), (1, 2)), 1.2, 1.25, 1.4),
    Target("wide experts, small model", _shapes((4096,), (384,), 16, (4,)), 1.4, 1.4, 1.4),
    Target("narrow experts", _shapes((4096,), (768,), 64, (8,)), 1.6, 1.5, 1.8),
    Target(
        "narrow experts, bfloat16",
        _shapes((4096,), (768,), 64, (8,), dtype="bfloat16"),
        2.0,
        2.0,
        1.8,
    ),
    Target("very narrow experts", _shapes((4096,), (384,), 64, (8, 16)), 2.6, 2.3, 1.8),
    Target("few tokens", _shapes((1024, 256), (384,), 64, (8,), (1, 2)), 3.5, None, 1.5, True),
    Target(
        "one token",
        _shapes((1,), (384, 768, 2048), 16, (4,)) + _shapes((1,), (768, 2048), 64, (8,)),
        1.2,
        None,
        1.8,
    ),
)


@dataclass(frozen=True)
class Check:
    """One number against its target."""

    what: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the target is met; a number that is missing meets nothing."""
        if self.value is None:
            return False
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def target_of(case: LayerCase) -> Target | None:
    """The target for a case, or None."""
    return next((target for target in TARGETS if case in target.cases), None)


def checks(row: LayerRow) -> list[Check]:
    """Everything that a row is held against: ratios of "auto", and of the compiled kernel.

    Whatever the shape, "auto" is nearly the fastest of our kernels and never slower than dense,
    or than transformers' backends where experts are owned. Shapes with a target have more to meet.

    Args:
        row: measured under tuned settings; others are held against nothing.
    """
    if row.settings != "tuned":
        return []
    target, auto = target_of(row.case), row.entry("auto")
    found = [Check("regret", row.regret, REGRET)]
    if row.case.owned:
        found.append(Check("peer", row.ahead(auto), 1.0, at_most=False))
    else:
        beat = target is not None and target.faster_than_dense
        found.append(Check("dense", row.to_dense(auto), 1.0 if beat else DENSE))
    return found if target is None else [*found, *_of_target(row, target)]


def _of_target(row: LayerRow, target: Target) -> list[Check]:
    case, auto = row.case, row.entry("auto")
    limit = target.forward if case.mode == "forward" else target.train
    assert limit is not None
    found = [
        Check("floor", row.to_floor(auto), limit),
        Check("peer", row.ahead(auto), target.ahead, at_most=False),
        Check("router", row.router_share, ROUTER),
    ]
    if case.mode == "train":
        found.append(Check("saved", row.saved(auto), SAVED))
    compiled = row.entry(COMPILED)
    if compiled is not None and compiled.ms and case.mode == "forward" and not case.decode:
        if case.width >= WIDE:
            found.append(Check("compiled", row.to_floor(compiled), COMPILED_WIDE))
        elif case.width <= NARROW:
            found.append(Check("compiled", row.to_floor(compiled), COMPILED_NARROW))
    return found


def met(rows: Iterable[LayerRow]) -> tuple[int, int]:
    """How many checks are met, and how many there are."""
    all_checks = [check for row in rows for check in checks(row)]
    return sum(check.met for check in all_checks), len(all_checks)
