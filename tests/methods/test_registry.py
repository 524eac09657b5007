"""Methods of a script's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

import moduli
from moduli.errors import ConfigError
from moduli.methods import registry
from moduli.methods.registry import get_method, method_names


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    registry._registered.clear()


def test_a_registered_class_is_known_by_name() -> None:
    @moduli.register
    @dataclass(frozen=True)
    class Own(moduli.EMoE):
        name: ClassVar[str] = "own"

    assert get_method("own") is Own
    assert "own" in method_names()


def test_names_of_moduli_are_taken() -> None:
    with pytest.raises(ConfigError, match="'emoe', as a method of moduli is already"):

        @moduli.register
        class Emoe(moduli.EMoE):
            name: ClassVar[str] = "emoe"


def test_a_name_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match="Nameless has no name of its own"):

        @moduli.register
        class Nameless(moduli.EMoE):
            pass
