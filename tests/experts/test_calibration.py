"""What is measured once per machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduli.experts.kernels.calibration import measured_once, read_calibration


def test_measuring_may_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a new machine, where a kernel asks for what its own measurement depends on."""
    monkeypatch.setenv("MODULI_CACHE", str(tmp_path))
    calls: list[str] = []

    def outer(name: str) -> float:
        calls.append(name)
        inner = measured_once("inner", ("speed",), lambda _: calls.append("speed") or 2.0)
        return 1.0 + inner["speed"]

    for _ in range(2):
        assert measured_once("outer", ("a", "b"), outer) == {"a": 3.0, "b": 3.0}
    assert calls == ["a", "speed", "b"]
    assert read_calibration() == {"inner": {"speed": 2.0}, "outer": {"a": 3.0, "b": 3.0}}
