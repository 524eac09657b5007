"""Configuration of ModuleFormer, with the names and defaults of the published one.

Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer `configuration_moduleformer.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from moduli.errors import ConfigError
from moduli.models.moduleformer.fields import check_fields
from moduli.models.registration import register_moduleformer


@strict
class ModuleFormerConfig(PreTrainedConfig):
    """How a ModuleFormer is built. Fields of published files that mean nothing here are kept.

    Attributes:
        vocab_size: entries of the embedding.
        n_embd: width of the model.
        att_hidden: width of the keys and values, and of each attention expert's queries.
        n_head: heads of an attention expert; with one head of the model's width, keys and values
            are the layer's input itself (all published checkpoints).
        ffd_hidden: neurons of a feed-forward expert.
        n_layer: blocks.
        n_att_experts, k_att: attention experts of a layer, and how many a token uses.
        n_mlp_experts, k_mlp: the same of feed-forward experts.
        att_experts_per_layer, mlp_experts_per_layer: numbers that differ by layer, after pruning;
            they replace `n_att_experts` and `n_mlp_experts`, and the reference cannot load them.
        gate_type: of the routers: "mlp", "linear", or "gmm" (cosines with centroids).
        gating_size: hidden width of the routers.
        sample_topk: in training so many of the k experts are drawn by probability.
        aux_loss_type: "mi" mutual information; any other name: the switch loss with a z-loss.
        aux_loss_weight: its weight. Published checkpoints have 0: tuned as they are, they are
            trained without; 0.01 is a start.
        concentration_weight: weight of the concentration loss, which gathers the load of a task
            on few experts before the others are pruned.
        count_padding: let padding enter the statistics of these losses, as the reference does.
        activation_function: of feed-forward experts.
        embd_pdrop, resid_pdrop, moe_pdrop: dropout of embeddings, of both sublayers' outputs, and
            on the hidden vector of "mlp" routers. attn_pdrop is kept and, as in the reference,
            not used.
        block_size, history_length: of the reference's training; sequences may be longer.
        legacy_buffers: write the reference's two masks per layer, which nothing reads, so that a
            saved file has the same tensors as a published one.
        initializer_range: standard deviation of linear layers and embeddings at the start.

    Raises:
        ConfigError: a field of another type or out of bounds, more experts per token than there
            are, or widths that do not fit.
        UnknownNameError: there is no such gate or activation.
    """

    __no_type_check__: ClassVar[bool] = True  # `strict` checks, and takes fields it does not know
    model_type = "moduleformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("past_key_values", "aux_loss", "concentration_loss"),
        *("router_logits", "router_experts", "router_load"),
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    base_model_ep_plan: ClassVar[dict[str, str]] = {  # type: ignore[assignment]
        # In this order: the dispatch looks at how many experts were left on the rank.
        "h.*.mlpf.experts.up_proj": "grouped_gemm",
        "h.*.mlpf.experts.down_proj": "grouped_gemm",
        "h.*.mlpf.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 50295
    n_embd: int = 1024
    att_hidden: int = 512
    n_head: int = 8
    ffd_hidden: int = 2048
    n_layer: int = 24
    n_att_experts: int = 32
    k_att: int = 2
    n_mlp_experts: int = 32
    k_mlp: int = 2
    att_experts_per_layer: list[int] | None = None
    mlp_experts_per_layer: list[int] | None = None
    gate_type: str = "mlp"
    gating_size: int = 256
    sample_topk: int = 0
    aux_loss_type: str = "mi"
    aux_loss_weight: float | int = 0.0
    concentration_weight: float | int = 0.0
    count_padding: bool = False
    activation_function: str = "gelu_new"
    embd_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    moe_pdrop: float | int = 0.0
    block_size: int = 512
    history_length: int = 512
    legacy_buffers: bool = True
    layer_norm_epsilon: float = 1e-5  # kept; the reference builds its norms with 1e-5 always
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        register_moduleformer()
        super().__post_init__(**kwargs)  # fields may have been given by transformers' names
        self.check()

    @property
    def head_size(self) -> int:
        """D: width of a head of an attention expert."""
        return self.att_hidden // self.n_head

    @property
    def shares_input(self) -> bool:
        """Whether keys and values are the layer's input itself."""
        return self.att_hidden == self.n_embd and self.n_head == 1

    def att_experts(self, layer: int) -> int:
        """Attention experts of a layer."""
        per_layer = self.att_experts_per_layer
        return self.n_att_experts if per_layer is None else per_layer[layer]

    def mlp_experts(self, layer: int) -> int:
        """Feed-forward experts of a layer."""
        per_layer = self.mlp_experts_per_layer
        return self.n_mlp_experts if per_layer is None else per_layer[layer]

    def check(self) -> None:
        """Raise what the class says."""
        check_fields(self)
        if self.att_hidden % self.n_head:
            works = [n for n in range(1, self.att_hidden + 1) if self.att_hidden % n == 0]
            near = min(works, key=lambda n: abs(n - self.n_head))
            raise ConfigError(
                f"att_hidden is {self.att_hidden}, which {self.n_head} heads (n_head) do not "
                f"divide; choose n_head={near}, or a multiple of {self.n_head} as att_hidden"
            )
        for kind, k in (("att", self.k_att), ("mlp", self.k_mlp)):
            per_layer = getattr(self, f"{kind}_experts_per_layer")
            if per_layer is not None and len(per_layer) != self.n_layer:
                raise ConfigError(
                    f"{kind}_experts_per_layer has {len(per_layer)} numbers for {self.n_layer} "
                    "layers (n_layer)"
                )
            fewest = min(per_layer or [getattr(self, f"n_{kind}_experts")])
            if not 1 <= k <= fewest:
                raise ConfigError(
                    f"k_{kind} is {k}, but there are {fewest} {kind} experts in a layer; choose at "
                    f"least 1 and at most {fewest}"
                )
            if not 0 <= self.sample_topk <= k:
                raise ConfigError(
                    f"sample_topk is {self.sample_topk}; it is a part of the k_{kind} = {k} experts"
                )
