"""Recognising an FFN that no table names: two or three linear projections around an activation.

A guess from shapes alone would be a guess; it is checked by running the block on random inputs
and comparing with what an FFN of these parts computes. Letters: D width, F neurons.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from moduli.surgery.families import Family
from moduli.surgery.projection import base_of, is_linear, shape_of

PROBES = 5


def recognise(block: nn.Module) -> tuple[Family | None, str | None]:
    """The family that the direct children of `block` make, if they make one.

    Returns:
        The family; or None and the reason if it looked like an FFN but computes something else;
        or twice None.
    """
    children = dict(block.named_children())
    linear = [name for name, module in children.items() if is_linear(base_of(module))]
    acts = [name for name, module in children.items() if _is_activation(module)]
    others = [name for name in children if name not in (*linear, *acts)]
    if len(acts) != 1 or len(linear) not in (2, 3):
        return None, None
    if any(True for name in others for _ in children[name].parameters()):
        return None, None
    guesses = _guesses(children, linear, acts[0], tuple(others), type(block).__name__)
    if not guesses:
        return None, None
    if any(p.is_meta for p in block.parameters()):
        return None, "its weights are on the meta device; load them first"
    reason = None
    for family in guesses:
        reason = _difference(block, family)
        if reason is None:
            return _in_order(block, family), None
    return None, f"has the parts of an FFN, but {reason}"


def _is_activation(module: nn.Module) -> bool:
    """A module without parameters from torch's or transformers' activations."""
    home = type(module).__module__
    known = home in ("torch.nn.modules.activation", "transformers.activations")
    return known and not any(True for _ in module.parameters())


def _guesses(
    children: dict[str, nn.Module], linear: list[str], act: str, others: tuple[str, ...], kind: str
) -> list[Family]:
    shapes = {name: shape_of(children[name]) for name in linear}
    found = []
    for names in itertools.permutations(linear):
        first, last, *up = names
        width, hidden = shapes[first]
        if any(shapes[name] != (width, hidden) for name in up):
            continue
        plain, fused = shapes[last] == (hidden, width), shapes[last] == (hidden, width // 2)
        if plain or (fused and not up):
            found.append(
                Family(
                    f"structure of {kind}",
                    first,
                    last,
                    act,
                    up=up[0] if up else None,
                    fused=not plain,
                    inner=others,
                )
            )
    return found


def _probe(block: nn.Module, family: Family) -> Tensor:
    """Random inputs [1, PROBES, D] of the block."""
    weight = next(block.parameters(), torch.zeros(1))  # a quantiser may keep its weights to itself
    generator = torch.Generator().manual_seed(0)
    width = shape_of(block.get_submodule(family.first))[1]
    x = torch.randn(1, PROBES, width, generator=generator)
    return x.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)


@torch.no_grad()
def _in_order(block: nn.Module, family: Family) -> Family:
    """The family, with those of its inner modules that the block calls last as `after`."""
    called: list[str] = []
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in (family.last, *family.inner)
    ]
    block(_probe(block, family))
    for hook in hooks:
        hook.remove()
    after = tuple(called[called.index(family.last) + 1 :])
    inner = tuple(name for name in family.inner if name not in after)
    return dataclasses.replace(family, inner=inner, after=after)


@torch.no_grad()
def _difference(block: nn.Module, family: Family) -> str | None:
    """Why the block does not compute what its parts would as an FFN; None if it does."""
    first, last = block.get_submodule(family.first), block.get_submodule(family.last)
    x = _probe(block, family)
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        got = block(x)
        z: Tensor = first(x)
        if family.fused:
            z, up = z.chunk(2, dim=-1)
        hidden = block.get_submodule(family.act)(z)
        if family.fused:
            hidden = hidden * up
        elif family.up is not None:
            hidden = hidden * block.get_submodule(family.up)(x)
        expected = last(hidden)
    except Exception as error:
        return f"it does not run on a [1, {PROBES}, D] tensor: {error!r}"
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return "it returns something else than a tensor of the width of its input"
    if not torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-4):
        return f"it does not compute {family.last}({family.act}({family.first}(x)))"
    return None
