"""Expert parallelism: transformers spreads owned experts over ranks by a plan that is made here."""

from __future__ import annotations

from torch import nn

from moduli.errors import ModelError
from moduli.experts.bank import ExpertBank
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.routed import RoutedLayer


def expert_parallel_plan(model: nn.Module) -> dict[str, str]:
    """The plan by which transformers spreads the experts of a model over ranks.

    Give it to `transformers.distributed.expert_parallel.apply_expert_parallelism`, or to
    `DistributedConfig(ep_plan=...)`.

    Raises:
        ModelError: an expert is a group of neurons of a dense FFN; those are sharded like the
            dense model (tensor parallelism, FSDP).
    """
    plan: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer) and not isinstance(module, OwnedExperts):
            raise ModelError(
                f"{name}: its experts are neurons of a dense FFN, which is sharded like the dense "
                "model (FSDP, tensor parallelism); expert parallelism needs experts with "
                "parameters of their own, such as those of sparse upcycling or GMoE"
            )
        if isinstance(module, ExpertBank) and name.endswith(".experts"):
            # In this order: the dispatch looks at how many experts were left on the rank.
            plan |= {f"{name}.{key}": "grouped_gemm" for key, _ in module.named_parameters()}
            plan[name] = "ep_dispatch_experts"
    if not plan:
        raise ModelError(f"this {type(model).__name__} has no experts of their own")
    return plan
