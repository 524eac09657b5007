"""The name "moduli" is known to transformers, whatever is imported first."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import moduli
from moduli import registration
from moduli.errors import ConfigError, UnknownNameError
from moduli.on_import import _ThenOnImport

NAMES = ExpertsInterface._global_mapping


def test_import_of_transformers_after_moduli() -> None:
    script = """
import sys, moduli
assert not {"torch", "transformers"} & set(sys.modules)
import transformers.integrations.moe as moe
assert "moduli" in moe.ALL_EXPERTS_FUNCTIONS
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("register", [registration.install, moduli.register_experts])
def test_import_of_moduli_after_transformers(
    register: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(NAMES, "moduli")
    hooks = len(sys.meta_path)
    register()
    register()
    assert "moduli" in ALL_EXPERTS_FUNCTIONS
    assert len(sys.meta_path) == hooks


def test_a_single_kernel_has_a_name_of_its_own() -> None:
    name = moduli.register_experts("padded")
    assert name == "moduli:padded"
    assert name in ALL_EXPERTS_FUNCTIONS
    assert moduli.register_experts("padded") == name
    del NAMES[name]
    with pytest.raises(UnknownNameError, match=r"'paded'.*Did you mean 'padded'"):
        moduli.register_experts("paded")


def test_names_and_kernels() -> None:
    names = {None: "auto", "moduli": "auto", "moduli:loop": "loop", "eager": None, "modul": None}
    assert {name: registration.kernel_of(name) for name in names} == names


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the given source that stands where transformers' registry does."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "REGISTRY", "a_registry")
    others = [finder for finder in sys.meta_path if not isinstance(finder, _ThenOnImport)]
    monkeypatch.setattr(sys, "meta_path", others)
    registration.install()

    def imported(source: str) -> ModuleType:
        (tmp_path / "a_registry.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "a_registry", raising=False)
        return importlib.import_module("a_registry")

    return imported


SOURCE = """
names = {}
class ExpertsInterface:
    register = names.__setitem__
"""


def test_the_import_leaves_no_trace_but_the_name(registry: Callable[[str], ModuleType]) -> None:
    second = _ThenOnImport()  # as of a second copy of moduli
    second.waiting["a_registry"] = [registration._register]
    sys.meta_path.insert(0, second)
    for _ in range(2):  # also when the module is imported anew
        module = registry(SOURCE)
        assert list(module.names) == ["moduli"]
    assert "ExpertsInterface" in inspect.getsource(module)
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__) is type(importlib.__loader__)  # that of an ordinary file


def test_a_transformers_without_registry_is_left_alone(
    registry: Callable[[str], ModuleType],
) -> None:
    registry("")
    with pytest.raises(ConfigError, match=r"a_registry has no ExpertsInterface.*transformers 5"):
        moduli.register_experts()


def test_an_error_in_the_registry_is_its_own(registry: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ZeroDivisionError):
        registry("1 / 0")
    with pytest.raises(ModuleNotFoundError, match="a_registry_of_nobody"):
        importlib.import_module("a_registry_of_nobody")
