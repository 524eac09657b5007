"""Single fields of a configuration: what each has to be, whatever the others are.

A configuration comes from a file or from a command line, so that anything may stand in a field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from moduli.errors import ConfigError, UnknownNameError, nearest

GATES = ("mlp", "linear", "gmm")

SIZES = (
    "vocab_size", "n_embd", "att_hidden", "n_head", "ffd_hidden", "n_layer", "gating_size",
    "n_att_experts", "n_mlp_experts", "k_att", "k_mlp",
)  # fmt: skip
"""Whole numbers of 1 or more."""
COUNTS = ("sample_topk", "block_size", "history_length")
"""Whole numbers of 0 or more."""
WEIGHTS = ("aux_loss_weight", "concentration_weight", "initializer_range")
"""Numbers of 0 or more."""
SHARES = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "moe_pdrop")
"""Numbers from 0 to 1."""
SWITCHES = ("count_padding", "legacy_buffers", "output_router_logits")
"""True or false."""
PER_LAYER = ("att_experts_per_layer", "mlp_experts_per_layer")
"""Lists of numbers of experts, or None."""


def check_fields(config: Any) -> None:
    """Raise unless every field by itself can work.

    Args:
        config: a ModuleFormerConfig, or anything with its fields.

    Raises:
        ConfigError: a field of another type, or a number that is too small or too large.
        UnknownNameError: there is no such gate or activation.
    """
    from transformers.activations import ACT2FN

    _require_name(config, "gate_type", GATES)
    _require_name(config, "activation_function", ACT2FN)
    if not isinstance(config.aux_loss_type, str):
        raise _wrong(config, "aux_loss_type", "a name: 'mi', or any other for the switch loss")
    for least, names in ((1, SIZES), (0, COUNTS)):
        for name in names:
            if not _is_number(value := getattr(config, name), int) or value < least:
                raise _wrong(config, name, f"a whole number of {least} or more")
    for name in (*WEIGHTS, *SHARES):
        most = 1.0 if name in SHARES else float("inf")
        if not _is_number(value := getattr(config, name), int, float) or not 0 <= value <= most:
            raise _wrong(config, name, f"a number {'from 0 to 1' if most == 1 else 'of 0 or more'}")
    for name in SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise _wrong(config, name, "true or false")
    for name in PER_LAYER:
        value = getattr(config, name)
        whole = isinstance(value, list | tuple) and all(_is_number(n, int) for n in value)
        if value is not None and not whole:
            raise _wrong(config, name, "a list with the number of experts of every layer, or None")


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _require_name(config: Any, field: str, known: Iterable[str]) -> None:
    value = getattr(config, field)
    if value not in list(known):
        raise UnknownNameError(f"{field} is {value!r}. {nearest(str(value), known)}")


def _wrong(config: Any, field: str, wanted: str) -> ConfigError:
    default = next(f.default for f in fields(config) if f.name == field)
    return ConfigError(
        f"{field} is {getattr(config, field)!r}; it is {wanted} (the default is {default!r})"
    )
