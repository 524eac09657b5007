"""An inspection as tables of words, the first row being the titles; they fit 80 columns."""

from __future__ import annotations

from moduli.inspect.record import Inspection, LayerInspection
from moduli.inspect.text import layer_names, shortened

Rows = tuple[tuple[str, ...], ...]

LEGEND = (
    "active: experts per token. busiest, idlest: their load, where equal use is 1.\n"
    "router: entropy of the softmax of its scores, 0 certain to 1 undecided.\n"
    "spread: entropy of the load, 0 one expert only to 1 equal use.\n"
    "dead: experts below 1 % of an equal share. equal: pairs of almost equal experts.\n"
    "split: share of the spread of the neurons' keys that lies between experts."
)
_NAME = 22


def layer_rows(inspection: Inspection) -> Rows:
    """One row per layer; see `LEGEND`."""
    titles = ("layer", "experts", "active", "busiest", "idlest", "router", "spread", "dead")
    rows = [
        (
            name,
            str(layer.num_experts),
            f"{layer.active:.4g}",
            f"{max(layer.load) * layer.num_experts:.2f}",
            f"{min(layer.load) * layer.num_experts:.2f}",
            "-" if layer.entropy is None else f"{layer.entropy:.2f}",
            f"{layer.load_entropy:.2f}",
            str(len(layer.dead)),
            str(len(layer.duplicates)),
            "-" if layer.quality is None else f"{layer.quality['share']:.0%}",
        )
        for name, layer in zip(_names(inspection), inspection.layers, strict=True)
    ]
    return ((*titles, "equal", "split"), *rows)


def domain_rows(inspection: Inspection) -> Rows:
    """For every domain the expert whose share in it most exceeds its share in all data."""
    rows = []
    for domain in inspection.domains:
        found = [
            (share - layer.load[e], name, e, share, layer)
            for name, layer in zip(_names(inspection), inspection.layers, strict=True)
            for e, share in enumerate(layer.by_domain.get(domain, ()))
        ]
        if found:
            _, name, e, share, layer = max(found, key=lambda one: one[0])
            shown = shortened(domain, _NAME)
            rows.append((shown, name, str(e), f"{share:.1%}", f"{layer.load[e]:.1%}"))
    return (("domain", "layer", "expert", "its share here", "in all data"), *rows)


def overlap_rows(inspection: Inspection) -> Rows:
    """For every layer the one whose first choices agree with its own most above chance."""
    names, rows = _names(inspection), []
    pairs = zip(inspection.overlap, inspection.overlap_by_chance, strict=False)
    for i, (overlap, by_chance) in enumerate(pairs):
        found = [
            (value - chance, names[j], value, chance)
            for j, (value, chance) in enumerate(zip(overlap, by_chance, strict=True))
            if i != j and value is not None and chance is not None
        ]
        if found:
            _, other, value, chance = max(found)
            rows.append((names[i], other, f"{value:.3f}", f"{chance:.3f}"))
    return (("layer", "most like", "overlap", "by chance"), *rows)


def tokens_seen(inspection: Inspection) -> str:
    """How many tokens the numbers are about, and how many positions were padding."""

    def of(layer: LayerInspection) -> str:
        return f"{layer.tokens:,} tokens ({layer.padding:.0%} of all positions were padding)"

    found = list(dict.fromkeys(map(of, inspection.layers)))
    return "; ".join(found[:2])


def _names(inspection: Inspection) -> list[str]:
    names = layer_names([layer.name for layer in inspection.layers])
    return [name if len(name) <= _NAME else f"…{name[1 - _NAME :]}" for name in names]
