"""A machine whose rates are given, so that nothing has to be measured."""

from __future__ import annotations

import pytest

from moduli.bench.machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine(
        processor="made up",
        isa="none",
        device="cpu",
        threads=1,
        cores=2,
        system="test",
        versions={"torch": "0", "transformers": "0"},
        wait_policy="passive",
        allocator="untouched",
        fp32="as torch has it",
        settings="defaults",
        load=0.0,
        gemm={"float32": 100.0, "bfloat16": 200.0},
        copy=20.0,
        read=25.0,
    )
