"""The measurements for GPUs, at small sizes on CPU, where their figures mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from moduli.bench.cases import LayerCase
from moduli.bench.machine import Machine

CPU = torch.device("cpu")
MACHINE = Machine(
    processor="none", isa="none", device="cpu", threads=1, cores=1, system="none", versions={},
    wait_policy="", allocator="", fp32="", settings="defaults", load=0.0,
    gemm={"float32": 1.0, "bfloat16": 1.0}, copy=1.0, read=1.0,
)  # fmt: skip


def test_every_part_runs_unless_some_are_named() -> None:
    assert gpu.options([]).parts == ["layers", "crossover", "routing", "launches", "stick"]
    assert gpu.options(["--parts", "routing", "--rounds", "9"]).parts == ["routing"]
    with pytest.raises(SystemExit):
        gpu.options(["--parts", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_all_that_suits_a_gpu_takes_part() -> None:
    case = LayerCase(tokens=32, hidden=32, experts=4, top_k=2, dtype="bfloat16")
    (row,) = gpu.layers([case], MACHINE, 1)
    assert row["entries"].keys() == set(gpu.TAKE_PART)
    for name in ("dense", "masked", "grouped", "transformers grouped_mm"):
        assert row["entries"][name]["ms"] > 0
        assert row["entries"][name]["to arithmetic"] > 0
    json.dumps(row)


def test_the_crossover_is_at_the_same_work() -> None:
    work = {(case.hidden, case.mode, case.flops) for case in gpu.crossover()}
    assert len(work) == 4
    assert {case.width for case in gpu.crossover()} == {1024, 512, 256, 128, 64, 32, 16}


def test_routing_and_launches() -> None:
    (row,) = gpu.routing([(16, 8, 4, 2)], CPU, 1)
    assert row["ms"].keys() == {"top-k", "sort", "order", "spread", "collect"}
    (row,) = gpu.launches([2], CPU, 1)
    assert {"masked", "grouped"} <= row["ms"].keys()
    assert all(ms > 0 for ms in row["ms"].values())


def test_stick_breaking_attention_beside_softmax() -> None:
    (row,) = gpu.stick([(8, 4, 2, 16)], CPU, 1)
    for way in ("forward ms", "with backward ms"):
        assert row[way].keys() == {"softmax", "blocked"}
        assert all(ms > 0 for ms in row[way].values())
    assert {shape[-1] for shape in gpu.STUCK} == {64, 128, 1024}
