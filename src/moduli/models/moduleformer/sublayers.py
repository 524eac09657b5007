"""Where the experts of a ModuleFormer are: what growing and pruning have to change together.

    attention      gate, experts [E, D, A], output_experts [E, A, D]
    feed-forward   gate, experts (up_proj [E, D, F], down_proj [E, F, D])

A gate has one row per expert, in the last of its matrices. The numbers of experts are in the
configuration: one for all layers, which is what a published checkpoint has, or one per layer.
Letters: E experts, K experts per token, D width, A width of queries, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.models.moduleformer.configuration import ModuleFormerConfig
from moduli.models.moduleformer.experts import ExpertLinear, ModuleFormerExperts
from moduli.models.moduleformer.routers import ModuleFormerRouter

Kind = Literal["attention", "feed_forward"]

FIELDS: dict[Kind, str] = {"attention": "att", "feed_forward": "mlp"}
"""What the fields of the configuration are called by."""

STACKS: dict[Kind, tuple[str, ...]] = {
    "attention": ("experts", "output_experts"),
    "feed_forward": ("experts",),
}
"""Modules beside the gate that hold one matrix per expert, or two."""

ROWS = {"mlp": "w_gate.3.weight", "linear": "w_gate.0.weight", "gmm": "expert_centroids"}
"""By type of gate, the parameter with one row per expert."""


@dataclass(frozen=True)
class Sublayer:
    """A router and its experts.

    Attributes:
        kind: of the experts.
        layer: number of the block.
        owner: module that holds the gate and the experts.
        norm: in front of it.
    """

    kind: Kind
    layer: int
    owner: Any
    norm: nn.LayerNorm

    @property
    def name(self) -> str:
        """For messages and reports."""
        return f"{self.kind} {self.layer}"


def decoder_of(model: Any) -> Any:
    """The `ModuleFormerModel` in a model with or without a head.

    Raises:
        ModelError: it is no ModuleFormer, or has adapters on it.
    """
    config = getattr(model, "config", None)
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{type(model).__name__} has adapters on its experts; merge them into the weights "
            "first (merge_and_unload)"
        )
    if not isinstance(config, ModuleFormerConfig) or not hasattr(model, "base_model"):
        raise ModelError(
            f"{type(model).__name__} is no ModuleFormer, whose experts can be added and removed"
        )
    return model.base_model


def sublayers(model: Any) -> list[Sublayer]:
    """All routers with their experts, in the order of `router_logits` of an output.

    Raises:
        ModelError: it is no ModuleFormer.
    """
    found = []
    for layer, block in enumerate(decoder_of(model).h):
        found.append(Sublayer("attention", layer, block.attn.q_proj, block.ln_1))
        found.append(Sublayer("feed_forward", layer, block.mlpf, block.ln_2))
    return found


def require_plain(parts: Sequence[Sublayer]) -> None:
    """Raise unless experts and gates are the plain modules of the whole model.

    Raises:
        ModelError: something else stands in their place, or only a part of the experts is here.
    """
    for part in parts:
        if type(part.owner.gate) is not ModuleFormerRouter:
            raise ModelError(_not_plain(part, "gate"))
        for name in STACKS[part.kind]:
            stack = getattr(part.owner, name)
            if type(stack) not in (ExpertLinear, ModuleFormerExperts):
                raise ModelError(_not_plain(part, name))
            for tensor in stack.parameters():
                if tensor.shape[0] != part.owner.gate.num_experts:
                    raise ModelError(
                        f"{part.name}: {tensor.shape[0]} of {part.owner.gate.num_experts} experts "
                        "are in this process; load the model without expert parallelism"
                    )


def _not_plain(part: Sublayer, name: str) -> str:
    return (
        f"{part.name}: {name} is a {type(getattr(part.owner, name)).__name__}; merge adapters "
        "(merge_and_unload) and load the model unquantised"
    )


def put_parameter(module: nn.Module, name: str, value: Tensor, *, trains: bool) -> None:
    """Put a tensor with another number of rows in the place of a parameter."""
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    setattr(holder, last, nn.Parameter(value, requires_grad=trains))
    if isinstance(holder, nn.Linear):
        holder.out_features = len(value)


def expert_counts(config: ModuleFormerConfig, kind: Kind) -> list[int]:
    """Experts of every layer."""
    of_layer = config.att_experts if kind == "attention" else config.mlp_experts
    return [of_layer(layer) for layer in range(config.n_layer)]


def set_expert_counts(model: Any, kind: Kind, counts: Sequence[int]) -> None:
    """Write the numbers of experts into the configuration: as one if all layers have as many,
    which the reference can read, else one by one."""
    uniform = len(set(counts)) == 1
    for config in _configs(model):
        setattr(config, f"n_{FIELDS[kind]}_experts", max(counts))
        per_layer = None if uniform else list(counts)
        setattr(config, f"{FIELDS[kind]}_experts_per_layer", per_layer)


def is_uniform(config: ModuleFormerConfig) -> bool:
    """Whether the reference's configuration can say how many experts there are."""
    return config.att_experts_per_layer is None and config.mlp_experts_per_layer is None


def _configs(model: Any) -> Iterator[ModuleFormerConfig]:
    """Each once: a model and its decoder usually have one in common."""
    decoder = decoder_of(model)
    yield decoder.config
    if model.config is not decoder.config:
        yield model.config
