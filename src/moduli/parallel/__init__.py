"""Experts over several devices.

Importing it offers the expert-parallel implementation "gating_dropout" to transformers, now or when
transformers' own module for it is imported.
"""

from types import ModuleType
from typing import Any

from moduli.on_import import on_import
from moduli.parallel.apply import AttachedGatingDropout, gating_dropout
from moduli.parallel.decisions import GatingDropout
from moduli.parallel.expert_parallel import expert_parallel_plan, spread_experts
from moduli.parallel.optimizer import load_optimizer, save_optimizer

__all__ = [
    "AttachedGatingDropout",
    "GatingDropout",
    "expert_parallel_plan",
    "gating_dropout",
    "load_optimizer",
    "save_optimizer",
    "spread_experts",
]


def _offer(module: ModuleType) -> None:
    def build(experts: Any, ep_mesh: Any, tp_mesh: Any) -> Any:
        from moduli.parallel.exchange import GatingDropoutEP

        return GatingDropoutEP(experts, ep_mesh, tp_mesh)

    module.EPImplementationInterface.register("gating_dropout", build)


on_import("transformers.distributed.expert_parallel", _offer)
