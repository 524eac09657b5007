"""Watching FFNs while their model runs on data: what the constructions that need data are fed.

Letters: T real tokens of a batch, D width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moduli.errors import ConfigError
from moduli.surgery.evaluating import evaluating
from moduli.surgery.locate import FFN

See = Callable[[FFN, Tensor, Tensor], None]
"""Called with (FFN, its input [T, D], its pre-activations [T, F])."""


@dataclass(frozen=True)
class Sample:
    """A dense model and inputs for it: what constructions that look at data are made from.

    Attributes:
        model: any.
        batches: keyword arguments of its forward; may be none.
    """

    model: nn.Module
    batches: Sequence[Mapping[str, Any]]


def require_data(sample: Sample | None, setting: str) -> Sample:
    """The sample, if it has inputs.

    Raises:
        ConfigError: there are none, although `setting` looks at data.
    """
    if sample is None or not sample.batches:
        raise ConfigError(
            f"{setting} looks at data: give it inputs by moduli.convert(model, method, "
            "batch=batch), keyword arguments of the model's forward, or a list of such batches; "
            "on the command line, by --data TASK"
        )
    return sample


@torch.no_grad()
def observe(
    model: nn.Module, ffns: Sequence[FFN], batches: Iterable[Mapping[str, Any]], see: See
) -> None:
    """Run the model in evaluation mode and show `see` what every FFN gets and computes.

    Padding is left out where the batch has an attention mask. Nothing is kept.

    Args:
        model: any.
        ffns: of the model, as `find_ffns` gives them.
        batches: keyword arguments of the model.
        see: see `See`; of a gated FFN the pre-activations are those of the gate projection.
    """
    current: Mapping[str, Any] = {}

    def hook_of(ffn: FFN) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
            keep = real_tokens(model, ffn, current, z.shape[:-1])
            # A fused projection returns the up projection behind the pre-activations.
            see(ffn, select_rows(args[0], keep), select_rows(z[..., : ffn.width], keep))

        return hook

    handles = [f.first.register_forward_hook(hook_of(f)) for f in ffns]
    try:
        with evaluating(model):
            for batch in batches:
                current = batch
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def real_tokens(
    model: nn.Module, ffn: FFN, batch: Mapping[str, Any], shape: torch.Size
) -> Bool[Tensor, "..."] | None:
    """Mask of `shape` of the tokens that are real by the batch; None if it has no mask that fits.

    The decoder of an encoder-decoder model has an attention mask of its own.
    """
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    own = both and "decoder" in ffn.name.split(".")
    mask = batch.get("decoder_attention_mask" if own else "attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None


def select_rows(x: Float[Tensor, "*batch D"], keep: Tensor | None) -> Float[Tensor, "T D"]:
    """The rows of x where `keep`, or all of them."""
    return x.reshape(-1, x.shape[-1]) if keep is None else x[keep.to(x.device)]
