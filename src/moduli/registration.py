"""Our kernels under the name "moduli" in transformers' experts interface.

transformers looks implementations up by name when a model is built or
`model.set_experts_implementation(name)` is called, and has no entry points for packages that bring
one. So `import moduli` adds the name at once where transformers has been imported, and otherwise as
soon as it is; neither imports transformers or torch, and kernels are imported at their first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moduli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "moduli"
REGISTRY = "transformers.integrations.moe"


def register_experts() -> None:
    """Make "moduli" an experts implementation of transformers; `import moduli` does so by itself.

    For a process that has taken the name away again, or does not want to depend on a hook of the
    import system. Calling it twice changes nothing.

    Raises:
        ConfigError: this version of transformers has no registry of experts implementations.
    """
    if not _register(import_module(REGISTRY)):
        raise ConfigError(
            f"{REGISTRY} has no ExpertsInterface to register {NAME!r} in; moduli needs "
            "transformers 5 or newer"
        )


def install() -> None:
    """Register now or when transformers is imported."""
    registry = sys.modules.get(REGISTRY)
    if registry is not None:
        _register(registry)
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register(registry: ModuleType) -> bool:
    """Whether there was a registry to register in."""
    interface = getattr(registry, "ExpertsInterface", None)
    if interface is None:
        return False
    interface.register(NAME, _experts_forward)
    return True


def _experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the registry holds: `moduli.experts.interface.experts_forward`, imported when called."""
    from moduli.experts.interface import experts_forward

    return experts_forward(module, hidden_states, top_k_index, top_k_weights)


class _RegisterOnImport(MetaPathFinder):
    """Leaves finding to the other finders, and runs `_register` after the registry's module."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


class _ThenRegister(Loader):
    """The given loader, which is put back in its place before the module runs."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module)
