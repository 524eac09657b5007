"""Turn what archives hold into what loads without anything extra: one file per kind of content.

A converter is a function `(source, out)` over two existing directories: it reads the extracted
members in the first and writes the result to the second. It draws no random number and reads
nothing else, so that the same archives always give the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moduli.data.convert.corpora import brown_to_table, sotu_to_table
from moduli.data.convert.debian import debian_descriptions_to_table
from moduli.data.convert.emoji import emoji_to_tables
from moduli.data.convert.gguf import gguf_to_pretrained
from moduli.data.convert.manpages import manpages_to_table
from moduli.data.convert.vit_onnx import vit_onnx_to_pretrained
from moduli.data.convert.wesnoth import wesnoth_to_table
from moduli.data.convert.whisper_ct2 import whisper_ct2_to_pretrained

CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "brown": brown_to_table,
    "debian": debian_descriptions_to_table,
    "emoji": emoji_to_tables,
    "gguf": gguf_to_pretrained,
    "manpages": manpages_to_table,
    "sotu": sotu_to_table,
    "vit_onnx": vit_onnx_to_pretrained,
    "wesnoth": wesnoth_to_table,
    "whisper_ct2": whisper_ct2_to_pretrained,
}
