"""Pictures and sound in tables: where their bytes are, and what they decode to.

A cell is a record with "path" or "bytes" (one of the two is None) and "digest", the hash of the
bytes, by which repetitions and changed files are noticed. Sound is wav, as scipy reads it: PCM of
8 to 32 bits, or floats.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from moduli.errors import DataError


def image_cell(value: Any, folder: Path | None) -> dict[str, Any]:
    """A picture from a path, from bytes, or from a record with either; its header is read.

    Raises:
        ValueError: it is no picture (the end of a sentence, see `moduli.data.cells`).
    """
    cell, content = _located(value, folder, "the path or the bytes of an image")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)):
            pass
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"no image that Pillow can read ({error})") from None
    return cell


def audio_cell(value: Any, folder: Path | None) -> dict[str, Any]:
    """Sound from a path, from bytes, from a record with either, or with "array" and
    "sampling_rate".

    Raises:
        ValueError: it is no wav file (the end of a sentence, see `moduli.data.cells`).
    """
    if isinstance(value, dict) and value.get("array") is not None:
        value = _as_wav(value)
    cell, content = _located(value, folder, "the path or the bytes of a wav file")
    if content[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        raise ValueError("no wav file; convert other formats to wav first")
    return cell


def open_image(cell: dict[str, Any]) -> Any:
    """The picture as a `PIL.Image` in RGB; what is transparent becomes white.

    Raises:
        DataError: the file has gone or is damaged.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(_content(cell))) as image:
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layer = image.convert("RGBA")
                white = Image.new("RGBA", layer.size, "white")
                return Image.alpha_composite(white, layer).convert("RGB")
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"The image {_title(cell)} cannot be read: {error}") from error


def read_audio(cell: dict[str, Any], sampling_rate: int) -> Any:
    """One channel of samples in [-1, 1] (float32, numpy) at `sampling_rate` per second.

    Channels are averaged; another sampling rate is converted (polyphase filter).

    Raises:
        DataError: the file has gone or is damaged.
    """
    import math

    import numpy as np
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        rate, samples = wavfile.read(io.BytesIO(_content(cell)))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The sound {_title(cell)} cannot be read: {error}") from error
    if samples.dtype == np.uint8:  # 8 bits are unsigned in wav files
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    samples = samples.astype(np.float32)
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    if rate != sampling_rate:
        common = math.gcd(rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // common, rate // common)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _as_wav(value: dict[str, Any]) -> bytes:
    import numpy as np
    from scipy.io import wavfile

    rate = value.get("sampling_rate")
    if not isinstance(rate, int) or rate < 1:
        raise ValueError("an array without a sampling_rate, samples per second")
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, np.asarray(value["array"], dtype=np.float32))
    return buffer.getvalue()


def _located(value: Any, folder: Path | None, wanted: str) -> tuple[dict[str, Any], bytes]:
    """The cell and its content."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        content = bytes(value)
        return {"path": None, "bytes": content, "digest": _digest(content)}, content
    if not isinstance(value, (str, Path)):
        raise ValueError(f"not {wanted}")
    path = Path(value).expanduser()
    path = (folder / path if folder is not None else path).absolute()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"which cannot be opened: {error.strerror or error}") from None
    return {"path": str(path), "bytes": None, "digest": _digest(content)}, content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(cell: dict[str, Any]) -> bytes:
    content: bytes | None = cell.get("bytes")
    return content if content is not None else Path(cell["path"]).read_bytes()


def _title(cell: dict[str, Any]) -> str:
    return str(cell["path"] or "in the table")
