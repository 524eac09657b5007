"""Text from data and models, made fit to be read on a page: nothing hidden, nothing too long."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Joiners are part of emoji and of several scripts; they hide nothing.
KEPT = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def visible(text: str) -> str:
    """The text with every character that would not show, or would reorder others, made visible.

    Control characters become their pictures, format characters (marks of direction among them),
    surrogates and unassigned ones their code in brackets.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if category in ("Zl", "Zp") or (category.startswith("C") and character not in KEPT):
        return f"⟨U+{code:04X}⟩"
    return character


def shortened(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where something was left out."""
    shown = visible(text)
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def layer_names(names: Sequence[str]) -> list[str]:
    """Names of layers for people: "layer 10" where the first number in a name tells them apart,
    "10 attn" where what follows it does."""
    found = [re.search(r"(?<![^.])(\d+)(?:\.(\w+))?(?![^.])", name) for name in names]
    numbers = [f"layer {m[1]}" if m else name for m, name in zip(found, names, strict=True)]
    parts = [f"{m[1]} {m[2]}" if m else name for m, name in zip(found, names, strict=True)]
    for short in (numbers, parts):
        if len(set(short)) == len(names):
            return short
    return list(names)
