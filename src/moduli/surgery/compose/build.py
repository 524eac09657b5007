"""Composing: plan, gates, then every tensor once from its source to its place.

The directory appears when it is complete. While weights are written, no more than two source
tensors are in memory, however many experts there are.

Letters: E experts, D width, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduli.errors import UnknownNameError, nearest
from moduli.surgery.checkpoint import versions
from moduli.surgery.compose.card import model_card
from moduli.surgery.compose.gates import Gates, make_gates
from moduli.surgery.compose.plan import Part, Plan
from moduli.surgery.compose.planning import plan
from moduli.surgery.compose.recipe import Recipe, Source
from moduli.surgery.compose.write import Slot, size_in_bytes, write_shards
from moduli.surgery.files import COMPOSED, check_target, new_directory

_ORDINARY = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)


@dataclass(frozen=True)
class ComposeReport:
    """What was written.

    Attributes:
        directory: loads with `AutoModelForCausalLM.from_pretrained`.
        plan: what is in it.
        conditions: condition number of each layer's router.
        dropped: for each expert, how far its attention, norms and embeddings, which the result
            does not hold, are from those of the base: |source - base| / |base|. Empty when they
            were averaged.
        warnings: what to know before using it.
    """

    directory: Path
    plan: Plan
    conditions: Sequence[float]
    dropped: Sequence[float]
    warnings: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        finite = [c if isfinite(c) else None for c in self.conditions]
        return {
            **self.plan.to_dict(),
            "directory": str(self.directory),
            "conditions": finite,
            "dropped": list(self.dropped),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        lines = [str(self.plan), f"written to {self.directory}; it loads with plain transformers"]
        for expert, share in zip(self.plan.experts, self.dropped, strict=False):
            lines.append(
                f"{expert.role}: its attention, norms and embeddings, {share:.2%} away from the "
                "base's, are left out"
            )
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])


def compose(
    base: str | Path,
    experts: Sequence[str | Path | Source],
    out: str | Path,
    *,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    on_event: Callable[[str], None] | None = None,
    **settings: Any,
) -> ComposeReport:
    """Make one MoE checkpoint of several fine-tunes of one base.

    Every expert is a source's FFNs. The rest comes from the base, or is averaged over the sources.

    Args:
        base: directory of the model the sources are fine-tunes of.
        experts: a directory, or a `Source` with prompts, for each expert.
        out: directory to write.
        device: on which the base reads the prompts.
        max_shard_size: of a weight file, as 500MB or 5GB.
        on_event: called with one line for every step that takes time.
        **settings: further fields of `Recipe`: top_k, gate, others, shared, target, ...

    Raises:
        ConfigError: a setting cannot work.
        ModelError: no stock class fits, or a source does not fit the base.
        CheckpointError: a source is missing, damaged, unsafe or lacks a tensor; or `out` exists.
    """
    known = {f.name for f in fields(Recipe)} - {"base", "experts"}
    for name in settings:
        if name not in known:
            raise UnknownNameError(f"compose has no setting {name!r}. {nearest(name, known)}")
    sources = tuple(e if isinstance(e, Source) else Source(model=str(e)) for e in experts)
    recipe = Recipe(base=str(base), experts=sources, **settings)
    return compose_recipe(
        recipe, out, device=device, max_shard_size=max_shard_size, on_event=on_event
    )


def compose_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    on_event: Callable[[str], None] | None = None,
) -> ComposeReport:
    """As `compose`, from a `Recipe`."""
    tell = on_event or (lambda line: None)
    target = Path(out)
    max_shard_bytes = size_in_bytes(max_shard_size)
    check_target(target)
    layout = plan(recipe)
    if recipe.needs_prompts:
        tell(f"{layout.base.name} reads the prompts (gate: {recipe.gate})")
    gates = make_gates(layout, device)
    tell(f"writing {layout.total_parameters:,} parameters")
    maker = _Maker(layout, gates)
    with new_directory(target) as folder:
        layout.config.save_pretrained(folder)
        write_shards(folder, [part.slot for part in layout.parts], maker.make, max_shard_bytes)
        _copy_ordinary(layout, folder)
        report = ComposeReport(target, layout, gates.conditions, maker.dropped(), gates.warnings())
        record = report.to_dict() | {"format": 1, "versions": versions(), "recipe": _named(layout)}
        del record["directory"]
        (folder / COMPOSED).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    return report


class _Maker:
    """Makes the tensors of a plan, one at a time, and measures what is left out of the sources."""

    def __init__(self, layout: Plan, gates: Gates) -> None:
        self._plan = layout
        self._gates = gates
        self._parts = {part.slot.name: part for part in layout.parts}
        self._generator = torch.Generator().manual_seed(layout.recipe.seed)
        self._base_square = 0.0
        self._far_squares = [0.0] * len(layout.experts)

    def make(self, slot: Slot) -> Tensor:
        part = self._parts[slot.name]
        if part.origin == "base":
            return self._from_base(part)
        if part.origin == "average":
            return self._average(part)
        if part.origin in ("expert", "shared"):
            return self._expert(part)
        if part.origin == "router":
            return self._gates.routers[part.index]
        if part.origin == "shared gate" and self._gates.shared is not None:
            return self._gates.shared[part.index]
        return torch.zeros(slot.shape)

    def dropped(self) -> list[float]:
        """See `ComposeReport.dropped`."""
        if not self._base_square:
            return []
        return [(square / self._base_square) ** 0.5 for square in self._far_squares]

    def _from_base(self, part: Part) -> Tensor:
        tensor = self._plan.base.read(part.tensor)
        self._base_square += _square(tensor)
        for i, source in enumerate(self._plan.experts):
            if part.tensor in source.names and source.shape(part.tensor) == part.slot.shape:
                self._far_squares[i] += _square(source.read(part.tensor) - tensor)
        return tensor

    def _average(self, part: Part) -> Tensor:
        """Mean over the sources, in float64, so that the mean of equal tensors is that tensor.

        Sources with a smaller vocabulary lack the last rows [V, D].
        """
        total = torch.zeros(part.slot.shape, dtype=torch.float64)
        count = torch.zeros(part.slot.shape[0], dtype=torch.float64)
        for source in self._plan.experts:
            tensor = source.read(part.tensor)
            total[: tensor.shape[0]] += tensor
            count[: tensor.shape[0]] += 1
        if self._plan.recipe.vocab == "zero_pad":
            count.fill_(len(self._plan.experts))
        return total / count.view(-1, *[1] * (total.dim() - 1))

    def _expert(self, part: Part) -> Tensor:
        recipe = self._plan.recipe
        if part.origin == "shared":
            source, given = self._plan.shared, recipe.shared
        else:
            source, given = self._plan.experts[part.index], recipe.experts[part.index]
        assert source is not None
        assert given is not None
        tensor = source.read(part.tensor)
        if given.noise_scale:
            noise = torch.randn(tensor.shape, generator=self._generator)
            tensor = tensor + given.noise_scale * noise.to(tensor.dtype)
        if part.projection == "down":
            scale = given.residual_scale
            if part.origin == "shared" and self._gates.shared is None:
                scale *= 2  # its gate is sigmoid(0) = 1/2 for every token
            tensor = tensor if scale == 1 else tensor * scale
        return tensor


def _square(tensor: Tensor) -> float:
    return float(tensor.float().square().sum(dtype=torch.float64))


def _copy_ordinary(layout: Plan, folder: Path) -> None:
    """Tokenizer and generation settings, byte for byte; no code."""
    for pattern in _ORDINARY:
        for path in sorted(layout.tokenizer.directory.glob(pattern)):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, folder / path.name)
            elif path.is_dir():
                shutil.copytree(path, folder / path.name)
    generation = layout.base.directory / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _named(layout: Plan) -> dict[str, Any]:
    """The recipe with names of directories in place of paths, which are nobody's business."""
    recipe = layout.recipe
    data: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    data["base"] = layout.base.name
    data["experts"] = [
        _fields(given) | {"model": source.name}
        for given, source in zip(recipe.experts, layout.experts, strict=True)
    ]
    if recipe.shared is not None and layout.shared is not None:
        data["shared"] = _fields(recipe.shared) | {"model": layout.shared.name}
    return data


def _fields(source: Source) -> dict[str, Any]:
    return {f.name: getattr(source, f.name) for f in fields(source)}
