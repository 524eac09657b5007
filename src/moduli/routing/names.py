"""Settings that are one of a few names."""

from __future__ import annotations

from typing import Any, get_args

from moduli.errors import ConfigError, nearest


def require_known(setting: str, value: object, names: Any) -> None:
    """Raise unless `value` is one of the names of a `Literal` type.

    Raises:
        ConfigError: it is not; suggests the nearest.
    """
    known = get_args(names)
    if value not in known:
        raise ConfigError(f"{setting} is {value!r}. {nearest(str(value), known)}")
