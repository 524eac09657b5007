"""Finding the FFNs of a model by their structure, and saying why a module does not fit.

A family is a pattern of sub-module names; a block fits if it has all of them and their shapes
agree. Letters: D width, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.surgery.projection import in_dim, is_stock, out_dim, rows, weight_of


@dataclass(frozen=True)
class Family:
    """Where a kind of block keeps the parts of its FFN, and what it does around them.

    Attributes:
        name: how reports call it.
        first: projection whose output passes the activation ("gate" in gated FFNs).
        last: projection back to the width.
        act: the activation module.
        up: second projection of a gated FFN, else None.
        entry: method of the block that computes the FFN, which the fast path takes over; None
            where the FFN is inline in a larger forward.
        tail: what `entry` does after the last projection: "none", "dropout" (GPT-2), or
            "output" (BERT: dropout, residual, LayerNorm in `block.output`).
    """

    name: str
    first: str
    last: str
    act: str
    up: str | None = None
    entry: str | None = "forward"
    tail: str = "none"


FAMILIES = (
    Family(
        "bert",
        "intermediate.dense",
        "output.dense",
        "intermediate.intermediate_act_fn",
        entry="feed_forward_chunk",
        tail="output",
    ),
    Family("llama", "gate_proj", "down_proj", "act_fn", up="up_proj"),
    Family("vit", "fc1", "fc2", "activation_fn"),
    Family("gpt2", "c_fc", "c_proj", "act", tail="dropout"),
)


@dataclass(frozen=True, eq=False)
class FFN:
    """One FFN of a model: a block, and where in it the parts are.

    Attributes:
        name: dotted name of the block in the model.
        index: position among the FFNs of the model, from 0.
        family: the pattern it fits.
        block: the module that holds it.
    """

    name: str
    index: int
    family: Family
    block: nn.Module

    @property
    def first(self) -> nn.Module:
        return self.block.get_submodule(self.family.first)

    @property
    def last(self) -> nn.Module:
        return self.block.get_submodule(self.family.last)

    @property
    def up(self) -> nn.Module | None:
        return None if self.family.up is None else self.block.get_submodule(self.family.up)

    @property
    def activation(self) -> nn.Module:
        return self.block.get_submodule(self.family.act)

    @property
    def projections(self) -> dict[str, nn.Module]:
        """Name within the block -> projection."""
        names = (self.family.first, self.family.up, self.family.last)
        return {n: self.block.get_submodule(n) for n in names if n is not None}

    @property
    def hidden(self) -> int:
        """D."""
        return rows(_base(self.first)).shape[1]

    @property
    def width(self) -> int:
        """F."""
        return rows(_base(self.first)).shape[0]

    @property
    def gated(self) -> bool:
        return self.family.up is not None

    def keys(self) -> Tensor:
        """Keys [F, D], as a view of the current weights of the first projection."""
        return rows(_base(self.first))

    def set_activation(self, module: nn.Module) -> None:
        """Put another module where the activation is."""
        owner, _, attribute = self.family.act.rpartition(".")
        setattr(self.block.get_submodule(owner), attribute, module)


@dataclass(frozen=True)
class Rejected:
    """A block that resembles an FFN but cannot be used, and why."""

    name: str
    reason: str


def _base(module: nn.Module) -> nn.Module:
    """The stock layer inside a tuner's wrapper (PEFT calls it `base_layer`)."""
    copies = _full_copies(module)
    if copies:
        active = getattr(module, "active_adapters", ())
        chosen = [copies[f"modules_to_save.{name}"] for name in active]
        return chosen[0] if chosen else copies["original_module"]
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _full_copies(module: nn.Module) -> dict[str, nn.Module]:
    """The layers in PEFT's `modules_to_save` wrapper, by name within it; empty for others."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return {}
    names = ("original_module", "modules_to_save")
    return {
        name: inner
        for name, inner in module.named_modules()
        if name.split(".")[0] in names and is_stock(inner)
    }


def survey(model: nn.Module) -> tuple[list[FFN], list[Rejected]]:
    """All FFNs in the order of the model's modules, and the near misses with their reason."""
    found: list[FFN] = []
    rejected: list[Rejected] = []
    for name, block in model.named_modules():
        for family in FAMILIES:
            present = [_has(block, path) for path in _parts(family)]
            if not any(present[:1]) or sum(present) < 2:
                continue
            reason = _misfit(block, family)
            if reason is None:
                found.append(FFN(name, len(found), family, block))
            else:
                rejected.append(Rejected(name, reason))
            break
    return found, rejected


def find_ffns(model: nn.Module) -> list[FFN]:
    """All FFNs of a model that can be split into experts.

    Raises:
        ModelError: there is none; says what was looked for and what came closest. Or the model
            carries adapters, wherever they are.
    """
    for name, module in model.named_modules():
        if _base(module) is not module or type(module).__name__.startswith("PeftModel"):
            raise ModelError(
                f"{name or 'the model'} is a {type(module).__name__}: the model carries adapters. "
                "Convert the model before adding adapters, so that they are made for the "
                "converted one; moduli.save and moduli.merge fit them to the original base again"
            )
    found, rejected = survey(model)
    if not found:
        looked = "; ".join(f"{f.name}: {', '.join(_parts(f))}" for f in FAMILIES)
        closest = "".join(f"\n  {r.name}: {r.reason}" for r in rejected[:5])
        raise ModelError(
            f"no FFN found in {type(model).__name__}. Looked for blocks with sub-modules "
            f"({looked}).{' Closest:' + closest if closest else ''}"
        )
    return found


def _parts(family: Family) -> list[str]:
    return [p for p in (family.first, family.last, family.act, family.up) if p is not None]


def _has(block: nn.Module, path: str) -> bool:
    for part in path.split("."):
        inner = getattr(block, part, None)
        if inner is None:
            return False
        block = inner
    return True


def _misfit(block: nn.Module, family: Family) -> str | None:
    """Why a block that looks like `family` cannot be split; None if it can."""
    missing = [path for path in _parts(family) if not _has(block, path)]
    if missing:
        return f"looks like {family.name}, but has no {', '.join(missing)}"
    act = block.get_submodule(family.act) if _is_module(block, family.act) else None
    if act is None:
        return f"its activation {family.act} is a function, not a module"
    layers = {p: block.get_submodule(p) for p in _parts(family) if p != family.act}
    for path, layer in layers.items():
        if hasattr(layer, "base_layer"):
            return (
                f"{path} is wrapped by an adapter ({type(layer).__name__}); "
                "convert before adding adapters"
            )
        if not is_stock(layer):
            return f"{path} is a {type(layer).__name__}, not a plain nn.Linear or Conv1D"
    first, last = layers[family.first], layers[family.last]
    width, hidden = rows(first).shape
    if tuple(rows(last).shape) != (hidden, width):
        return (
            f"{family.first} maps {hidden} to {width}, but {family.last} maps "
            f"{rows(last).shape[1]} to {rows(last).shape[0]}"
        )
    if family.up is not None and rows(layers[family.up]).shape != rows(first).shape:
        return f"{family.up} and {family.first} have different shapes"
    if any(weight_of(layer).is_meta for layer in layers.values()):
        return "its weights are on the meta device; load them first"
    return None


def _is_module(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def neuron_tensors(ffn: FFN) -> list[tuple[str, Tensor, int]]:
    """Every tensor of the block that has a neuron dimension: (name in the block, tensor, dim).

    Besides weights and biases of the projections these are the factors of LoRA adapters on them:
    the output side of an adapter on a projection into the neurons, the input side of one out of
    them, and the magnitude vector of DoRA; and the full copies that PEFT's `modules_to_save` makes.

    Raises:
        ModelError: an adapter whose coordinates are not known sits on a projection.
    """
    found: list[tuple[str, Tensor, int]] = []
    for path, layer in ffn.projections.items():
        outward = path == ffn.family.last
        base = _base(layer)
        plain = {"": layer} if base is layer else {"base_layer": base}
        for name, module in (_full_copies(layer) or plain).items():
            prefix = f"{path}.{name}." if name else f"{path}."
            dim = in_dim(module) if outward else out_dim(module)
            found.append((f"{prefix}weight", weight_of(module), dim))
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor) and not outward:
                found.append((f"{prefix}bias", bias, 0))
        if hasattr(layer, "base_layer"):
            found += [(f"{path}.{n}", t, d) for n, t, d in _adapter_tensors(layer, outward)]
    return found


def _adapter_tensors(layer: nn.Module, outward: bool) -> list[tuple[str, Tensor, int]]:
    found: list[tuple[str, Tensor, int]] = []
    for name, tensor in layer.named_parameters():
        part = name.split(".", 1)[0]
        if part == "base_layer":
            continue
        if part == "lora_A":  # [R, in]
            if outward:
                found.append((name, tensor, 1))
        elif part == "lora_B" or part == "lora_magnitude_vector":  # [out, R]
            if not outward:
                found.append((name, tensor, 0))
        else:
            raise ModelError(
                f"{type(layer).__name__} has a parameter {name!r} whose neuron order is not "
                "known; LoRA and DoRA are. Merge or unload the adapter first."
            )
    return found
