"""Stock MoE classes of transformers: which dense model each one can hold, and under which names.

A dense decoder fits a stock MoE class exactly where the two differ in the FFN alone: attention,
norms and embeddings are the same functions of the same tensors. This table says for which pairs
that holds, builds the MoE's config from the dense one, names the tensors as the class's published
checkpoints do (one tensor per expert and projection; transformers stacks them while loading), and
states the class's routing rule as data.

    stock = stock_for("llama")
    if reason := stock.refusal(dense_config): ...
    config = stock.config(dense_config, num_experts=4, top_k=2)
    gate, up, down = stock.expert_tensors(layer=0, expert=3)

Letters: D width, F neurons, E experts, K experts per token.
Source: models/{mixtral,qwen2_moe,qwen3_moe,flex_olmo}/ and conversion_mapping.py of transformers
5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from moduli.errors import ConfigError, ModelError, UnknownNameError, nearest

StockRule = Literal["renormalised", "probabilities"]
"""Weights of the K best experts: their softmax over all E, either divided by its sum over the K
(they sum to 1; at K = 1 the weight is 1) or as it is."""

# Written anew for every checkpoint, or true of the dense class only.
_NOT_COPIED = {"architectures", "transformers_version", "id2label", "label2id", "problem_type"}
# Of a shared expert that is not there: wide enough for any kernel, tensor-parallel split and
# quantisation block, next to nothing beside a real FFN.
_NO_SHARED_WIDTH = 256


class Projections(NamedTuple):
    """Names of the three tensors of a gated FFN: down(act(gate x) * (up x))."""

    gate: str
    up: str
    down: str


_STANDARD = Projections("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StockMoE:
    """One pair: a dense model type, and the stock MoE class that holds it exactly.

    Attributes:
        dense: `model_type` of the dense config.
        moe: `model_type` of the MoE config.
        architecture: class that `config.json` names.
        block: name of the MoE block in a layer, in published checkpoints.
        projections: names of gate, up and down within an expert.
        experts_field: field of the MoE config that holds E.
        width_field: field of the MoE config that holds F of an expert.
        rules: routing rules the class can follow; the first is what its config defaults to here.
        has_shared: the class always has one shared expert, weighted by sigmoid(gate x).
        required: field of the dense config -> the one value with which the pair is exact, and why
            another does not fit.
        settings: further fields of the MoE config.
    """

    dense: str
    moe: str
    architecture: str
    block: str = "mlp"
    projections: Projections = _STANDARD
    experts_field: str = "num_experts"
    width_field: str = "moe_intermediate_size"
    rules: tuple[StockRule, ...] = ("renormalised", "probabilities")
    has_shared: bool = False
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def refusal(self, dense_config: Any) -> str | None:
        """Why the MoE class would not compute what the dense model does; None if it would.

        Args:
            dense_config: a transformers config.
        """
        if dense_config.model_type != self.dense:
            return f"its model type is {dense_config.model_type!r}, not {self.dense!r}"
        if getattr(dense_config, "quantization_config", None) is not None:
            return "its weights are quantised; dequantise and save it first"
        for name, (value, reason) in self.required.items():
            given = getattr(dense_config, name, value)
            if given != value:
                return f"{name} is {given!r}, and {reason}"
        if "sliding_attention" in (getattr(dense_config, "layer_types", None) or ()):
            return (
                f"some of its layers attend to a window only, which {self.moe} cannot set by layer"
            )
        return None

    def config(
        self,
        dense_config: Any,
        num_experts: int,
        top_k: int,
        *,
        rule: StockRule = "renormalised",
        shared_width: int | None = None,
    ) -> Any:
        """Config of the MoE model with E full-width experts in every layer.

        Rope, norms, heads, context, token ids, dtype and tying come from the dense config.

        Args:
            dense_config: of the dense model.
            num_experts: E.
            top_k: K.
            rule: weights of the chosen experts.
            shared_width: neurons of the shared expert, where the class has one; None for one
                that is not used (all its weights have to be 0 then).

        Raises:
            ModelError: the dense model does not fit.
            ConfigError: K is not in 1..E, or the class cannot follow the rule.
        """
        import transformers

        reason = self.refusal(dense_config)
        if reason is not None:
            raise ModelError(f"{self.moe} cannot hold this model exactly: {reason}")
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k is {top_k}, but there are {num_experts} experts")
        if rule not in self.rules:
            raise ConfigError(
                f"{self.moe} cannot weight experts by {rule!r}; it can by {', '.join(self.rules)}"
            )
        kind = transformers.CONFIG_MAPPING[self.moe]
        known = {f.name for f in fields(kind)} | {"head_dim"}
        values = {
            f.name: getattr(dense_config, f.name)
            for f in fields(dense_config)
            if f.name in known - _NOT_COPIED
        }
        values |= dict(self.settings)
        values |= {self.experts_field: num_experts, "num_experts_per_tok": top_k}
        values[self.width_field] = dense_config.intermediate_size
        if len(self.rules) > 1:
            values["norm_topk_prob"] = rule == "renormalised"
        if self.has_shared:
            unused = min(_NO_SHARED_WIDTH, dense_config.intermediate_size)
            values["shared_expert_intermediate_size"] = shared_width or unused
        return kind(architectures=[self.architecture], **values)

    def dense_tensors(self, layer: int) -> Projections:
        """Names of the FFN's tensors in the dense checkpoint: [F, D], [F, D] and [D, F]."""
        return _names(f"model.layers.{layer}.mlp", _STANDARD)

    def expert_tensors(self, layer: int, expert: int) -> Projections:
        """Names of an expert's tensors in the MoE checkpoint, shaped as the dense ones."""
        return _names(f"{self._block(layer)}.experts.{expert}", self.projections)

    def router_tensor(self, layer: int) -> str:
        """Name of the router's weight [E, D]."""
        return f"{self._block(layer)}.gate.weight"

    def shared_tensors(self, layer: int) -> Projections:
        """Names of the shared expert's tensors.

        Raises:
            ModelError: the class has none.
        """
        return _names(f"{self._shared(layer)}", self.projections)

    def shared_gate(self, layer: int) -> str:
        """Name of the weight [1, D] of the shared expert's gate.

        Raises:
            ModelError: the class has none.
        """
        return f"{self._shared(layer)}_gate.weight"

    def copied(self, dense_tensor: str) -> str | None:
        """Name in the MoE checkpoint of a tensor that is taken over; None for those of the FFN.

        Every class of the table calls attention, norms and embeddings as the dense one does.
        """
        return None if ".mlp." in dense_tensor else dense_tensor

    def _block(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}"

    def _shared(self, layer: int) -> str:
        if not self.has_shared:
            raise ModelError(f"{self.moe} has no shared expert")
        return f"{self._block(layer)}.shared_expert"


def stock_for(dense_model_type: str, target: str | None = None) -> StockMoE:
    """The stock MoE class for a dense model type.

    Args:
        dense_model_type: `config.model_type` of the dense model.
        target: `model_type` of the MoE class, where there is a choice; the first of the table by
            default.

    Raises:
        ModelError: no stock class holds this model exactly.
        UnknownNameError: `target` is not one of its classes.
    """
    fitting = [entry for entry in STOCK if entry.dense == dense_model_type]
    if not fitting:
        known = {entry.dense for entry in STOCK}
        raise ModelError(
            f"no MoE class of transformers holds a {dense_model_type!r} model exactly. "
            f"{nearest(dense_model_type, known)}"
        )
    if target is None:
        return fitting[0]
    for entry in fitting:
        if entry.moe == target:
            return entry
    raise UnknownNameError(
        f"a {dense_model_type!r} model does not become {target!r}. "
        f"{nearest(target, [entry.moe for entry in fitting])}"
    )


def _names(prefix: str, parts: tuple[str, ...]) -> Projections:
    gate, up, down = (f"{prefix}.{part}.weight" for part in parts)
    return Projections(gate, up, down)


_NO_BIAS = {
    "attention_bias": (False, "the MoE class has attention without biases"),
    "mlp_bias": (False, "experts have no biases"),
}
_NO_WINDOW = {"sliding_window": (None, "the MoE class would attend to everything")}
_MIXTRAL: dict[str, Any] = {
    "moe": "mixtral",
    "architecture": "MixtralForCausalLM",
    "block": "block_sparse_moe",
    "projections": Projections("w1", "w3", "w2"),
    "experts_field": "num_local_experts",
    "width_field": "intermediate_size",
    "rules": ("renormalised",),
}
_QWEN2: dict[str, Any] = {
    "moe": "qwen2_moe",
    "architecture": "Qwen2MoeForCausalLM",
    "has_shared": True,
}
_QWEN2_FULL_ATTENTION = {"qkv_bias": False, "use_sliding_window": False, "sliding_window": None}

STOCK: tuple[StockMoE, ...] = (
    StockMoE(dense="llama", required=_NO_BIAS, settings={"sliding_window": None}, **_MIXTRAL),
    StockMoE(dense="mistral", **_MIXTRAL),
    StockMoE(dense="qwen2", settings={"qkv_bias": True}, **_QWEN2),
    StockMoE(
        dense="qwen3",
        moe="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
    ),
    StockMoE(
        dense="olmo2",
        moe="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        width_field="intermediate_size",
    ),
    # Only where a shared expert is wanted, which Mixtral does not have.
    StockMoE(dense="llama", required=_NO_BIAS, settings=_QWEN2_FULL_ATTENTION, **_QWEN2),
    StockMoE(dense="mistral", required=_NO_WINDOW, settings=_QWEN2_FULL_ATTENTION, **_QWEN2),
)
