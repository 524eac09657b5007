"""Errors of moduli: each says what was given, what was expected and the nearest thing that works.

Every class also derives from the built-in it specialises, so that code which knows nothing of
moduli (`except ValueError`) keeps working. The command line turns each into one line on standard
error and the exit status in `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModuliError(Exception):
    """Base of all errors that moduli raises on purpose."""

    exit_code = 1


class ConfigError(ModuliError, ValueError):
    """A setting has a value that cannot work (top_k > num_experts, an unknown layer spec, ...)."""

    exit_code = 2


class UnknownNameError(ConfigError, LookupError):
    """A method, task, package, layer or option name that does not exist."""


class ModelError(ModuliError, TypeError):
    """The model has no part on which the method can act, or is in the wrong state for the call."""

    exit_code = 3


class CheckpointError(ModuliError, OSError):
    """A checkpoint that is missing, damaged, unsafe, changed since it was written, or not ours."""

    exit_code = 4


class DataError(ModuliError, ValueError):
    """Data that cannot be trained or evaluated on (no label column, one class, empty domain)."""

    exit_code = 5


class FetchError(ModuliError, ConnectionError):
    """A package that could not be fetched, or whose content is not what was expected."""

    exit_code = 6


class TrainingError(ModuliError, ArithmeticError):
    """Training that had to stop, for example because the loss was no longer finite."""

    exit_code = 7


class UnsupportedError(ModuliError, NotImplementedError):
    """A transformation of PyTorch that a layer has no rule for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names nearest to `name`, for the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known names: {', '.join(known)}." if known else "There are none."
