"""Finding methods: every folder of this package, and entry points of other packages.

A built-in method is a folder `methods/NAME/` whose package exports one `Method` class. Another
package offers one by an entry point in the group "moduli.methods", `name = "package:Class"`; a
script registers its own class. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.methods.base import Method

GROUP = "moduli.methods"
M = TypeVar("M", bound=type[Method])

_registered: dict[str, type[Method]] = {}


def register(method: M) -> M:
    """Class decorator: make a method known by its name in this process, so that `moduli.load`
    can bring its models back.

    Raises:
        ConfigError: the name belongs to another method.
    """
    name = method.__dict__.get("name")
    if not isinstance(name, str):
        raise ConfigError(f'{method.__name__} has no name of its own; give it one: name = "..."')
    if name in _folders():
        raise ConfigError(f"{method.__name__} is named {name!r}, as a method of moduli is already")
    _registered[name] = method
    return method


def _folders() -> dict[str, str]:
    """Name of every built-in method -> its module."""
    package = import_module("moduli.methods")
    found = pkgutil.iter_modules(package.__path__)
    return {m.name.replace("_", "-"): f"{package.__name__}.{m.name}" for m in found if m.ispkg}


def method_names() -> list[str]:
    """Names of all methods that can be used here, sorted."""
    return sorted({*_folders(), *_registered, *(point.name for point in entry_points(group=GROUP))})


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UnknownNameError: there is none of that name; suggests the nearest.
    """
    folders = _folders()
    if name in folders:
        return _method_in(import_module(folders[name]))
    if name in _registered:
        return _registered[name]
    for point in entry_points(group=GROUP, name=name):
        return _checked(point.load(), point.value)
    raise UnknownNameError(f"there is no method {name!r}. {nearest(name, method_names())}")


def class_named(attribute: str) -> Any:
    """A method class by its class name, as `moduli.EMoE` asks for it; None if there is none.

    The name of the folder is that of the class in lower case, underscores aside, so that only
    the right folder is imported.
    """
    flat = attribute.lower()
    for name, module in _folders().items():
        if name.replace("-", "") == flat:
            return getattr(import_module(module), attribute, None)
    for point in entry_points(group=GROUP):
        if point.value.rpartition(":")[2] == attribute:
            return _checked(point.load(), point.value)
    return None


def _method_in(module: Any) -> type[Method]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and value is not Method:
            return value
    raise UnknownNameError(f"{module.__name__} exports no Method class")


def _checked(value: Any, origin: str) -> type[Method]:
    if not (isinstance(value, type) and issubclass(value, Method)):
        raise UnknownNameError(f"the entry point {origin} is not a moduli Method class")
    return value
