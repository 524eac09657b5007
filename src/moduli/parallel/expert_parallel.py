"""Expert parallelism: transformers spreads owned experts over ranks by a plan that is made here.

Every rank has a batch of its own and E / R of the experts of each layer; all other weights are
sharded by FSDP2 (data parallelism). Saving gathers, so that a checkpoint holds all experts and is
loaded by any number of ranks.
Letters: E experts, R ranks.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from moduli.errors import ConfigError, ModelError
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.routed import RoutedLayer
from moduli.surgery.stochastic import stochastic_projections

CONTRACT = ("hidden_states", "top_k_index", "top_k_weights")
"""Arguments of experts of transformers, and of ours."""


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts of every mixture layer by name: upcycled or stock, on transformers' contract.

    Raises:
        ModelError: an expert is a group of neurons of a dense FFN.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer) and not isinstance(module, OwnedExperts):
            raise ModelError(
                f"{name}: its experts are neurons of a dense FFN, which is sharded like the dense "
                "model (FSDP, tensor parallelism); expert parallelism needs experts with "
                "parameters of their own, such as those of sparse upcycling or GMoE"
            )
        if name.rpartition(".")[2] == "experts" and _on_contract(module):
            found[name] = module
    return found


def spreadable_experts(model: nn.Module) -> dict[str, Any]:
    """The same, of a model that has some.

    Raises:
        ModelError: an expert is a group of neurons of a dense FFN, or there are none.
    """
    found = expert_modules(model)
    if not found and stochastic_projections(model):
        raise ModelError(
            f"the experts of this {type(model).__name__} are named for the whole batch by a plan "
            "(THOR), so that no token would go to another rank; train it data-parallel"
        )
    if not found:
        raise no_experts(model)
    return found


def no_experts(model: nn.Module) -> ModelError:
    """Why no experts were found: there are none, or they take other arguments."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            takes = f"takes ({', '.join(_arguments(module))})"
            if type(module).forward is nn.Module.forward:
                takes = "has no forward of its own"
            return ModelError(
                f"{name} of this {kind} is a {type(module).__name__}, which {takes}; expected "
                f"num_experts and a forward that takes ({', '.join(CONTRACT)}), as stock experts "
                "of Mixtral, OLMoE and Qwen2-MoE have, and FFNs that moduli has upcycled"
            )
    return ModelError(f"this {kind} has no experts of their own")


def _on_contract(module: nn.Module) -> bool:
    counted = isinstance(getattr(module, "num_experts", None), int)
    return counted and _arguments(module)[:3] == CONTRACT


def _arguments(module: nn.Module) -> tuple[str, ...]:
    # Of the class: where experts are spread already, the module's own forward is another.
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def expert_parallel_plan(model: nn.Module) -> dict[str, str]:
    """The plan by which transformers spreads the experts of a model over ranks.

    Give it to `transformers.distributed.expert_parallel.apply_expert_parallelism`.

    Raises:
        ModelError: an expert is a group of neurons of a dense FFN; those are sharded like the
            dense model (tensor parallelism, FSDP).
    """
    plan: dict[str, str] = {}
    for name, experts in spreadable_experts(model).items():
        # In this order: the dispatch looks at how many experts were left on the rank.
        plan |= {f"{name}.{key}": "grouped_gemm" for key, _ in experts.named_parameters()}
        plan[name] = "ep_dispatch_experts"
    return plan


def spread_experts(
    model: Any, *, ranks: int | None = None, implementation: str = "gating_dropout"
) -> None:
    """Spread a model that every process holds whole over all processes, in place.

    Call it in every process (`torchrun`, `accelerate launch`), with the same weights in each, and
    give each its own batches. A `Trainer` takes the model as it is; an own loop calls
    `loss.backward()` and steps an optimiser that was made afterwards. A large stock model is better
    spread while it is loaded: `from_pretrained(..., distributed_config=DistributedConfig(
    fsdp_size=R, ep_size=R, ep_implementation="gating_dropout"))`.

    Args:
        model: of transformers, stock or converted.
        ranks: R, over how many processes the experts of a layer are spread; a divisor of the
            number of processes. None takes all.
        implementation: how tokens reach experts: a name in transformers'
            `EPImplementationInterface`.

    Raises:
        ConfigError: experts cannot be spread evenly over so many ranks, or there is one process.
        ModelError: no experts of their own, or no model of transformers.
    """
    import torch.distributed as dist
    from transformers import PreTrainedModel
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    from transformers.distributed.utils import initialize_distributed_mesh

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers; it is transformers that spreads "
            "experts (for other modules, see expert_parallel_plan)"
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        raise ConfigError(
            "there is one process; start several (torchrun --nproc_per_node=2 script.py) and call "
            "torch.distributed.init_process_group, or use gating_dropout(model, ..., ranks=R), "
            "whose ranks are virtual"
        )
    ranks = ranks or world
    if world % ranks:
        raise ConfigError(f"ranks is {ranks}, which does not divide {world} processes")
    for name, experts in spreadable_experts(model).items():
        require_divisible(name, experts.num_experts, ranks)
    wild = {
        replace_layer_number_by_wildcard(name): style
        for name, style in expert_parallel_plan(model).items()
    }
    settings = DistributedConfig(
        fsdp_size=world, ep_size=ranks, ep_plan=wild, ep_implementation=implementation
    )
    model._fsdp_plan = _units(model)
    _, manager = initialize_distributed_mesh(settings)
    type(model).maybe_distribute_model(model, settings, manager)


def require_divisible(name: str, count: int, ranks: int) -> None:
    """Raise unless `count` experts can be spread evenly.

    Raises:
        ConfigError: they cannot.
    """
    if count % ranks:
        fitting = [r for r in range(1, count + 1) if count % r == 0]
        why = "more ranks than experts" if ranks > count else "not evenly divisible"
        raise ConfigError(
            f"{name}: {count} experts over {ranks} ranks: {why}; choose "
            f"{', '.join(map(str, fitting))} ranks"
        )


def _units(model: Any) -> dict[str, str]:
    """What FSDP gathers at once: what the model says itself, where that names its parts, else the
    blocks that it says must not be split."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    named = {replace_layer_number_by_wildcard(n): m for n, m in model.named_modules()}
    said = {name: style for name, style in (model.fsdp_plan or {}).items() if name in named}
    if any("*" in name for name in said):
        return said
    blocks = model._no_split_modules or ()
    units = {name: "free_full_weight" for name, m in named.items() if type(m).__name__ in blocks}
    return units or said or {name: "free_full_weight" for name, _ in model.named_children()}
