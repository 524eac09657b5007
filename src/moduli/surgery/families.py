"""Where each kind of transformer block keeps the parts of its FFN: a table of sub-module names.

Blocks are recognised by these names and by the shapes of what they name, not by their class. What
is not in the table is recognised by its structure (`moduli.surgery.structure`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Family:
    """One kind of FFN: last(inner(act(first(x)))), or last(inner(act(first(x)) * up(x))).

    Attributes:
        name: how reports call it.
        first: projection whose output passes the activation ("gate" in gated FFNs).
        last: projection back to the width.
        act: the activation.
        up: second projection of a gated FFN, else None.
        fused: gated, and `first` makes both halves: the one that is activated, then the other.
        entry: method of the block that computes the FFN, which the fast path takes over; None
            where the FFN is inline in a larger forward.
        inner: modules between activation and `last` (dropout).
        after: modules that `entry` calls after `last`.
        residual: `entry` ends as BERT's does: dropout, residual, LayerNorm in `block.output`.
        beside: a sub-module that blocks with an inline FFN have besides it.
    """

    name: str
    first: str
    last: str
    act: str
    up: str | None = None
    fused: bool = False
    entry: str | None = "forward"
    inner: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    residual: bool = False
    beside: str | None = None

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Paths of the sub-modules that make the family."""
        return tuple(p for p in (self.first, self.up, self.last, self.act) if p is not None)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Paths that a block must have to be of this family."""
        return self.parts if self.beside is None else (*self.parts, self.beside)


FAMILIES = (
    Family(  # RoBERTa, DeBERTa, ...; where the layer calls both parts itself, there is no entry
        "bert",
        "intermediate.dense",
        "output.dense",
        "intermediate.intermediate_act_fn",
        entry="feed_forward_chunk",
        residual=True,
    ),
    # Mistral, Qwen, Gemma, SwiGLU variants of DINOv2, ...
    Family("llama", "gate_proj", "down_proj", "act_fn", up="up_proj"),
    # Marian, Whisper, OPT, ...: the layer itself holds the projections
    Family("bart", "fc1", "fc2", "activation_fn", entry=None, beside="self_attn"),
    # DeiT, DINOv2, AST, CLIP, Phi, ...
    Family("vit", "fc1", "fc2", "activation_fn"),
    Family("gpt2", "c_fc", "c_proj", "act", after=("dropout",)),
    Family("t5", "wi", "wo", "act", inner=("dropout",)),
    Family("t5-gated", "wi_0", "wo", "act", up="wi_1", inner=("dropout",)),
    Family("distilbert", "lin1", "lin2", "activation", after=("dropout",)),
    Family("modernbert", "Wi", "Wo", "act", fused=True, inner=("drop",)),
    Family("phi3", "gate_up_proj", "down_proj", "activation_fn", fused=True),
    Family("neox", "dense_h_to_4h", "dense_4h_to_h", "act"),
    # Its forward adds the residual, too.
    Family("bloom", "dense_h_to_4h", "dense_4h_to_h", "gelu_impl", entry=None),
    Family("gptj", "fc_in", "fc_out", "act", after=("dropout",)),
    Family("timm", "fc1", "fc2", "act", inner=("drop1", "norm"), after=("drop2",)),
    Family(  # HuBERT, WavLM, ...
        "wav2vec2",
        "intermediate_dense",
        "output_dense",
        "intermediate_act_fn",
        inner=("intermediate_dropout",),
        after=("output_dropout",),
    ),
)
