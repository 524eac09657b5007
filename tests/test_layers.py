"""Imports point downhill: cli, study, inspect, methods, training, surgery, experts, routing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "moduli"
# Each room, and the rooms it may import from besides itself. The root files (errors, version) are
# open to all; the package's own __init__ holds lazy names only.
ROOMS: dict[str, set[str]] = {
    "routing": set(),
    "losses": {"routing"},
    "data": {"routing"},
    "experts": {"routing"},
    "surgery": {"experts", "routing", "losses"},
    "training": {"surgery", "experts", "routing", "losses", "data"},
    "parallel": {"training", "surgery", "experts", "routing", "losses", "data"},
    "models": {"training", "surgery", "experts", "routing", "losses", "data"},
    "methods": {"training", "surgery", "experts", "routing", "losses", "data"},
    "bench": {"methods", "training", "surgery", "experts", "routing", "losses", "data"},
    "inspect": {"methods", "training", "surgery", "experts", "routing", "losses", "data"},
    "study": {
        *("inspect", "methods", "models", "training", "surgery", "experts", "routing", "losses"),
        "data",
    },
    "cli": {
        *("study", "inspect", "bench", "methods", "models", "training", "surgery", "experts"),
        *("routing", "losses", "data"),
    },
}
FREE = {"errors", "version", "cache", "allocator", ""}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moduli":
            module = (node.module or "").split(".")
            names = [a.name for a in node.names] if len(module) == 1 else [module[1]]
            found |= set(names)
        elif isinstance(node, ast.Import):
            parts = [a.name.split(".") for a in node.names]
            found |= {[*p, ""][1] for p in parts if p[0] == "moduli"}
    return found


def test_every_room_is_known() -> None:
    rooms = {p.name for p in SRC.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downhill(room: str) -> None:
    allowed = ROOMS[room] | {room} | FREE
    for path in (SRC / room).rglob("*.py"):
        rooms = {name for name in imports_of(path) if name in ROOMS}
        assert rooms <= allowed, f"{path.relative_to(SRC)} imports {sorted(rooms - allowed)}"


def test_methods_do_not_import_each_other() -> None:
    for folder in (p for p in (SRC / "methods").iterdir() if p.is_dir()):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "moduli.methods."
                ):
                    owner = (node.module or "").split(".")[2]
                    assert owner in {folder.name, "base", "registry", "api"}, path
