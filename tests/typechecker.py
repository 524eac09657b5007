"""The run-time type checker that `conftest` puts on every function of moduli: beartype."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, except on methods that return `Self`, which it cannot read outside a class."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
