"""Compile converted models as one graph with the default compiler; run by `test_compile.py`.

Usage: compile_worker.py BACKEND FAMILY... In a process of its own, because the compiler cannot
trace the shape checks of the other tests.
"""

import sys
from typing import Any

import torch

import moduli
from tests import families

SETTINGS: dict[str, dict[str, Any]] = {
    "live gate": {},
    "learned gate": {"gate": "linear"},
    "cosine scores": {"normalize_gate": True},
}


def main(backend: str, names: list[str]) -> None:
    for family in names:
        for case, settings in SETTINGS.items():
            torch.compiler.reset()
            model = families.build(family)
            settings = {"num_experts": 6, "top_k": 2, "layers": "all", **settings}
            moduli.convert(model, moduli.EMoE(**settings))
            batch = families.inputs(family)
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            with torch.no_grad():
                expected, found = model(**batch).logits, compiled(**batch).logits
                with moduli.dense(model):
                    dense = model(**batch).logits
            error = float((found - expected).norm() / expected.norm())
            assert error < 1e-4, f"{family}, {case}: {error}"
            change = float((dense - expected).norm() / expected.norm())
            assert change > 1e-2, f"{family}, {case}: routing changes nothing"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
