"""What an inspection says in words: statements on the tokens that were seen, and no others."""

from __future__ import annotations

from collections.abc import Iterator

from moduli.inspect.figures import distance
from moduli.inspect.record import Inspection
from moduli.inspect.text import layer_names


def headline(inspection: Inspection) -> list[str]:
    """What stands out, one sentence each: unused, busiest and equal experts, domains, training."""
    if not inspection.layers:
        return ["No layer with experts was seen."]
    if not any(layer.tokens for layer in inspection.layers):
        return ["No token was seen, so nothing can be said of the experts."]
    sentences = [*_unused(inspection), _busiest(inspection)]
    sentences += _duplicates(inspection)
    sentences += _domains(inspection)
    sentences += _training(inspection)
    return sentences


def _names(inspection: Inspection) -> list[str]:
    return layer_names([layer.name for layer in inspection.layers])


def _unused(inspection: Inspection) -> Iterator[str]:
    named = list(zip(_names(inspection), inspection.layers, strict=True))
    affected = [(name, layer) for name, layer in named if layer.dead]
    if not affected:
        yield "Every expert of every layer was used: none got less than 1 % of an equal share."
    elif len(affected) <= 3:
        for name, layer in affected:
            count, never = len(layer.dead), sum(layer.load[e] == 0 for e in layer.dead)
            if never == count:
                verb = "was" if count == 1 else "were"
                yield f"{count} of {layer.num_experts} experts of {name} {verb} never used."
            else:
                tail = f"; {never} of them never" if never else ""
                yield (
                    f"{count} of {layer.num_experts} experts of {name} got less than 1 % of an "
                    f"equal share{tail}."
                )
    else:
        count = sum(len(layer.dead) for _, layer in affected)
        total = sum(layer.num_experts for layer in inspection.layers)
        name, worst = max(affected, key=lambda pair: len(pair[1].dead))
        yield (
            f"{count} of {total} experts, in {len(affected)} of {len(inspection.layers)} layers, "
            f"got less than 1 % of an equal share; most of them ({len(worst.dead)}) in {name}."
        )


def _busiest(inspection: Inspection) -> str:
    times, expert, name = max(
        (layer.num_experts * load, expert, name)
        for name, layer in zip(_names(inspection), inspection.layers, strict=True)
        for expert, load in enumerate(layer.load)
    )
    return (
        f"The busiest expert is number {expert} of {name}, with {times:.1f} times an equal share."
    )


def _duplicates(inspection: Inspection) -> Iterator[str]:
    pairs = [
        (similarity, i, j, name)
        for name, layer in zip(_names(inspection), inspection.layers, strict=True)
        for i, j, similarity in layer.duplicates
    ]
    if not pairs:
        return
    similarity, i, j, name = max(pairs)
    most = f"experts {i} and {j} of {name} (cosine similarity {similarity:.3f})"
    if len(pairs) == 1:
        yield f"Two experts have almost equal parameters: {most}."
    else:
        yield f"{len(pairs)} pairs of experts have almost equal parameters, most of all {most}."


def _domains(inspection: Inspection) -> Iterator[str]:
    moved = [
        (distance(shares, layer.load), domain, name)
        for name, layer in zip(_names(inspection), inspection.layers, strict=True)
        if len(layer.by_domain) > 1
        for domain, shares in layer.by_domain.items()
    ]
    if moved:
        share, domain, name = max(moved)
        yield (
            f"The domain routed least like all data together is {domain}, in {name}: "
            f"{100 * share:.1f} % of its selections go to other experts."
        )


def _training(inspection: Inspection) -> Iterator[str]:
    if inspection.selection is None or len(inspection.selection.steps) < 2:
        return
    shares = inspection.selection.shares
    moved = [
        (distance(rows[0], rows[-1]), name)
        for name, rows in zip(layer_names(list(shares)), shares.values(), strict=True)
    ]
    if moved:
        share, name = max(moved)
        yield (
            f"Between the first and the last window of training at most {100 * share:.1f} % of a "
            f"layer's selections moved to other experts ({name})."
        )
