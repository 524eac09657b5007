"""Turn what archives hold into what loads without anything extra: one file per kind of content.

A converter is a function `(source, out)` over two existing directories: it reads the extracted
members in the first and writes the result to the second. It draws no random number and reads
nothing else, so that the same archives always give the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moduli.data.convert.gguf import gguf_to_pretrained

CONVERTERS: dict[str, Callable[[Path, Path], None]] = {"gguf": gguf_to_pretrained}
