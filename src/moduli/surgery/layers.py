"""Which layers: "all", "last:2", "every:2", "even", a list of indices, or module-name patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from moduli.errors import ConfigError
from moduli.surgery.locate import FFN

LayerSpec = str | Sequence[int] | Sequence[str]

FORMS = (
    '"all", "last:2", "first:2", "every:2", "even", a list of indices such as [4, 5], '
    'or name patterns such as "*.layer.5" or ["*.5.mlp"]'
)


def choose_layers(ffns: Sequence[FFN], spec: LayerSpec) -> list[FFN]:
    """The FFNs that `spec` names, in model order.

    "every:n" takes the last FFN and every n-th before it, so that the top is always included.
    "even" takes the FFNs 0, 2, 4, ... of every stack, encoder and decoder each counted from 0.
    Negative indices count from the end.

    Raises:
        ConfigError: the spec has no known form, or names nothing, or an index is out of range.
    """
    if isinstance(spec, str):
        return _from_word(ffns, spec)
    if all(isinstance(i, int) and not isinstance(i, bool) for i in spec) and spec:
        count = len(ffns)
        bad = [i for i in spec if not -count <= int(i) < count]
        if bad:
            raise ConfigError(
                f"layers={list(spec)}: {bad} out of range, the model has {count} FFNs"
            )
        wanted = {int(i) % count for i in spec}
        return [f for f in ffns if f.index in wanted]
    if all(isinstance(p, str) for p in spec) and spec:
        return _from_patterns(ffns, [str(p) for p in spec])
    raise ConfigError(f"layers={spec!r} is not understood; it may be {FORMS}")


def _from_word(ffns: Sequence[FFN], spec: str) -> list[FFN]:
    word, _, number = spec.partition(":")
    if spec == "all":
        return list(ffns)
    if spec == "even":
        return _even(ffns)
    if word in ("last", "first", "every") and number.isdigit() and int(number) > 0:
        n = int(number)
        if word == "every":
            return [f for f in ffns if (len(ffns) - 1 - f.index) % n == 0]
        if n > len(ffns):
            raise ConfigError(f"layers={spec!r}, but the model has only {len(ffns)} FFNs")
        return list(ffns[-n:] if word == "last" else ffns[:n])
    if any(mark in spec for mark in "*?[.") or any(f.name == spec for f in ffns):
        return _from_patterns(ffns, [spec])
    raise ConfigError(f"layers={spec!r} is not understood; it may be {FORMS}")


def _even(ffns: Sequence[FFN]) -> list[FFN]:
    """Every second FFN of those whose names differ in numbers alone: they are of one stack."""
    seen: dict[str, int] = {}
    chosen = []
    for ffn in ffns:
        stack = re.sub(r"\d+", "#", ffn.name)
        seen[stack] = seen.get(stack, 0) + 1
        if seen[stack] % 2:
            chosen.append(ffn)
    return chosen


def _from_patterns(ffns: Sequence[FFN], patterns: Sequence[str]) -> list[FFN]:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(f.name, pattern) for f in ffns):
            names = ", ".join(f.name for f in ffns[:3])
            raise ConfigError(
                f"no FFN has a name like {pattern!r}; the {len(ffns)} FFNs of the model are "
                f"{names}{', ...' if len(ffns) > 3 else ''}"
            )
    return [f for f in ffns if any(fnmatch.fnmatchcase(f.name, p) for p in patterns)]
