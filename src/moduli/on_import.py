"""Do something as soon as another package's module is there.

Packages that keep registries without entry points want to be told of what we bring, but importing
them for that would make `import moduli` slow. What is told here is done at once where the module
has been imported, and otherwise right after it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], Any]


def on_import(module: str, then: Then) -> None:
    """Call `then(module)` now, or once the module has been imported.

    Telling the same twice changes nothing.

    Args:
        module: its full name.
        then: must not import anything that imports the module.
    """
    there = sys.modules.get(module)
    if there is not None and not getattr(there.__spec__, "_initializing", False):
        then(there)
        return
    finder = next((f for f in sys.meta_path if isinstance(f, _ThenOnImport)), None)
    if finder is None:
        finder = _ThenOnImport()
        sys.meta_path.insert(0, finder)
    waiting = finder.waiting.setdefault(module, [])
    if then not in waiting:
        waiting.append(then)


class _ThenOnImport(MetaPathFinder):
    """Leaves finding to the other finders, and has their loader do more."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Then]] = {}

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _AndThen(spec.loader, self.waiting[fullname])
                return spec
        return None


class _AndThen(Loader):
    """The given loader, which is put back in its place before the module runs."""

    def __init__(self, loader: Loader, waiting: list[Then]) -> None:
        self.loader, self.waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for then in self.waiting:
            then(module)
