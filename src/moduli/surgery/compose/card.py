"""What lies beside composed weights for people: a model card. Sources are names, never paths."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moduli.surgery.files import COMPOSED

if TYPE_CHECKING:
    from moduli.surgery.compose.build import ComposeReport


def model_card(report: ComposeReport) -> str:
    """A README.md in the form that model hubs read."""
    layout = report.plan
    recipe = layout.recipe
    rows = []
    for number, (source, given) in enumerate(zip(layout.experts, recipe.experts, strict=True)):
        used = given.positive_prompts[:3] if recipe.needs_prompts else ()
        prompts = "; ".join(json.dumps(text, ensure_ascii=False) for text in used)
        rows.append(f"| {number} | {source.name} | {prompts.replace('|', chr(92) + '|')} |")
    others = (
        f"from {layout.base.name}"
        if recipe.others == "base"
        else "averaged over the experts' sources"
    )
    shared = "" if layout.shared is None else f"\nShared expert: {layout.shared.name}.\n"
    table = "\n".join(rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- moe
- merge
- moduli
---

# {layout.base.name}: {len(layout.experts)} experts

A {layout.stock.architecture} composed of fine-tunes of {layout.base.name}:
{layout.total_parameters:,} parameters, {layout.active_parameters:,} active per token,
{recipe.top_k} experts per token. It loads with plain transformers.

| expert | FFNs of | prompts of its gate |
|---|---|---|
{table}
{shared}
Attention, norms and embeddings: {others}. Gates: `{recipe.gate}`. The whole recipe is in
`{COMPOSED}`.
"""
