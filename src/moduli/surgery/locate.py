"""Finding the FFNs of a model by their structure, and saying why a module does not fit.

Letters: D width, F neurons.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.surgery.families import FAMILIES, Family
from moduli.surgery.projection import (
    base_of,
    bias_of,
    is_linear,
    is_stock,
    shape_of,
    weight_rows,
    whole,
)
from moduli.surgery.structure import recognise

PARTS = frozenset(path for family in FAMILIES for path in family.parts)


@dataclass(frozen=True, eq=False)
class FFN:
    """One FFN of a model: a block, and where in it the parts are.

    Attributes:
        name: dotted name of the block in the model.
        index: position among the FFNs of the model, from 0.
        family: the pattern it fits.
        block: the module that holds it.
        order: the neurons in expert order, where they have not changed places; None else.
    """

    name: str
    index: int
    family: Family
    block: nn.Module
    order: Int[Tensor, " F"] | None = None

    @property
    def first(self) -> nn.Module:
        return self.block.get_submodule(self.family.first)

    @property
    def last(self) -> nn.Module:
        return self.block.get_submodule(self.family.last)

    @property
    def up(self) -> nn.Module | None:
        """Second projection of a gated FFN, where it is a module of its own."""
        return None if self.family.up is None else self.block.get_submodule(self.family.up)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        owner, _, attribute = self.family.act.rpartition(".")
        found: Callable[[Tensor], Tensor] = getattr(self.block.get_submodule(owner), attribute)
        return found

    @property
    def projections(self) -> dict[str, nn.Module]:
        """Name within the block -> projection."""
        names = (self.family.first, self.family.up, self.family.last)
        return {n: self.block.get_submodule(n) for n in names if n is not None}

    @property
    def inner(self) -> list[nn.Module]:
        """Modules between activation and last projection, where they exist."""
        return _existing(self.block, self.family.inner)

    @property
    def after(self) -> list[nn.Module]:
        """Modules that the block calls after the last projection, where they exist."""
        return _existing(self.block, self.family.after)

    @property
    def hidden(self) -> int:
        """D."""
        return shape_of(self.first)[1]

    @property
    def width(self) -> int:
        """F."""
        return shape_of(self.last)[1]

    @property
    def gated(self) -> bool:
        return self.family.up is not None or self.family.fused

    @property
    def device(self) -> torch.device:
        """Where the block computes; the CPU if a quantiser keeps its weights to itself."""
        tensors = itertools.chain(self.block.parameters(), self.block.buffers())
        first = next(tensors, None)
        return torch.device("cpu") if first is None else first.device

    @property
    def movable(self) -> bool:
        """Whether neurons can change places: every projection holds a plain weight."""
        return all(is_stock(base_of(layer)) for layer in self.projections.values())

    def keys(self) -> Float[Tensor, "F D"]:
        """Keys, from the current weights of the first projection; a view where it is stock."""
        matrix = weight_rows(self.first)
        return self._ordered(matrix[: self.width] if self.family.fused else matrix)

    def key_bias(self) -> Float[Tensor, " F"] | None:
        """Bias of the keys, or None."""
        bias = bias_of(base_of(self.first))
        return None if bias is None else self._ordered(whole(bias)[: self.width])

    def _ordered(self, tensor: Tensor) -> Tensor:
        return tensor if self.order is None else tensor[self.order.to(tensor.device)]

    def up_keys(self) -> Float[Tensor, "F D"] | None:
        """Rows of the up projection of a gated FFN."""
        if self.up is not None:
            return weight_rows(self.up)
        return weight_rows(self.first)[self.width :] if self.family.fused else None

    def up_bias(self) -> Float[Tensor, " F"] | None:
        """Bias of the up projection of a gated FFN, or None."""
        if self.up is not None:
            bias = bias_of(base_of(self.up))
            return None if bias is None else whole(bias)
        bias = bias_of(base_of(self.first)) if self.family.fused else None
        return None if bias is None else whole(bias)[self.width :]

    def up_output(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """What a gated FFN multiplies the activations with, through its own modules."""
        module = self.first if self.up is None else self.up
        full: Tensor = module(x)
        return full[..., -self.width :]

    def set_activation(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put another activation in its place; modules and plain functions both fit."""
        path, _, attribute = self.family.act.rpartition(".")
        owner = self.block.get_submodule(path)
        if not isinstance(function, nn.Module):
            delattr(owner, attribute)  # a registered module cannot be overwritten by a function
        setattr(owner, attribute, function)


@dataclass(frozen=True)
class Rejected:
    """A block that resembles an FFN but cannot be used, and why."""

    name: str
    reason: str


def survey(model: nn.Module) -> tuple[list[FFN], list[Rejected]]:
    """All FFNs in the order of the model's modules, and the near misses with their reason."""
    blocks: list[tuple[str, Family, nn.Module]] = []
    rejected: list[Rejected] = []
    for name, block in model.named_modules():
        family, reason = _family_of(block)
        if reason is not None:
            rejected.append(Rejected(name, reason))
        elif family is not None:
            blocks.append((name, family, block))
    # Where the table knows the FFNs of a model, what only looks like one is a head.
    named = [entry for entry in blocks if entry[1] in FAMILIES]
    found = [
        FFN(name, i, _as_used(block, family), block)
        for i, (name, family, block) in enumerate(named or blocks)
    ]
    return found, rejected


def find_ffns(model: nn.Module) -> list[FFN]:
    """All FFNs of a model that can be split into experts.

    Raises:
        ModelError: there is none; says what was looked for and what came closest.
    """
    found, rejected = survey(model)
    if not found:
        looked = "; ".join(f"{f.name}: {', '.join(f.required)}" for f in FAMILIES)
        closest = "".join(f"\n  {r.name}: {r.reason}" for r in rejected[:5])
        raise ModelError(
            f"no FFN found in {type(model).__name__}. Looked for blocks that hold two or three "
            "linear projections and an activation of their own, and for blocks with sub-modules "
            f"({looked}).{' Closest:' + closest if closest else ''}"
        )
    return found


def _family_of(block: nn.Module) -> tuple[Family | None, str | None]:
    """The family of a block, or why it cannot be used, or neither if it is no FFN at all."""
    if not any(True for _ in block.children()):  # as most modules; it holds no projections
        return None, _bank_in(block)
    present = {f: [path for path in f.required if _has(block, path)] for f in FAMILIES}
    for family, paths in present.items():
        if len(paths) == len(family.required):
            reason = _misfit(block, family)
            return (family, None) if reason is None else (None, reason)
    guess, reason = recognise(block)
    if guess is not None or reason is not None:
        return guess, reason
    bank = _bank_in(block)
    if bank is not None:
        return None, bank
    nearest = max(FAMILIES, key=lambda f: len(present[f]) / len(f.required))
    missing = [path for path in nearest.required if path not in present[nearest]]
    if len(present[nearest]) < 2 or len(missing) > 1:
        return None, None
    return None, f"looks like {nearest.name}, but has no {missing[0]}"


def _bank_in(block: nn.Module) -> str | None:
    own = block.named_parameters(recurse=False)
    bank = any(p.dim() == 3 and name in PARTS for name, p in own)
    return "is a bank of experts already" if bank else None


def _as_used(block: nn.Module, family: Family) -> Family:
    """The family, without its entry where the block's own code has to run.

    A block that holds the probability of a dropout calls it as a function, unseen by us.
    """
    drops = any("dropout" in key and isinstance(p, float) for key, p in vars(block).items())
    if family.entry != "forward" or not drops or _existing(block, family.inner):
        return family
    return dataclasses.replace(family, entry=None)


def _has(block: nn.Module, path: str) -> bool:
    for part in path.split("."):
        inner = getattr(block, part, None)
        if inner is None:
            return False
        block = inner
    return True


def _misfit(block: nn.Module, family: Family) -> str | None:
    """Why a block that looks like `family` cannot be split; None if it can."""
    owner, _, attribute = family.act.rpartition(".")
    if not callable(getattr(block.get_submodule(owner), attribute)):
        return f"its activation {family.act} cannot be called"
    layers: dict[str, nn.Module] = {}
    for path in family.parts:
        if path != family.act:
            try:
                layers[path] = block.get_submodule(path)
            except AttributeError:
                return (
                    f"looks like {family.name}, but {path} is no linear projection (a bank of "
                    "experts already?)"
                )
    for path, layer in layers.items():
        if not is_linear(base_of(layer)):
            return f"{path} is a {type(layer).__name__}, not a linear projection"
    (width, hidden), (out, neurons) = (shape_of(layers[p]) for p in (family.first, family.last))
    if (out, neurons * (2 if family.fused else 1)) != (hidden, width):
        return f"{family.first} maps {hidden} to {width}, but {family.last} maps {neurons} to {out}"
    if family.up is not None and shape_of(layers[family.up]) != (width, hidden):
        return f"{family.up} and {family.first} have different shapes"
    if any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return "its weights are on the meta device; load them first"
    for module, path in zip(_existing(block, family.inner), family.inner, strict=False):
        if any(True for _ in module.parameters()):
            return f"{path}, between its activation and {family.last}, has parameters"
    return None


def _existing(block: nn.Module, paths: tuple[str, ...]) -> list[nn.Module]:
    found = [getattr(block, path, None) for path in paths]
    return [module for module in found if isinstance(module, nn.Module)]


def carries_adapters(model: nn.Module) -> bool:
    """Whether PEFT has wrapped a layer of the model."""
    return any(base_of(module) is not module for module in model.modules())


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Parts of a model that get an attention mask of their own, by name; {"": model} for most."""
    found: list[nn.Module] = []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = [getattr(model, f"get_{side}")() for side in ("encoder", "decoder")]
    elif isinstance(getattr(model, "text_model", None), nn.Module):
        found = [model.get_submodule("text_model")]
    names = {id(module): name for name, module in model.named_modules()}
    named = {names[id(module)]: module for module in found if id(module) in names}
    return named or {"": model}
