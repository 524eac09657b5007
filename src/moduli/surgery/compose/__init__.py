"""Several fine-tunes of one base as one MoE checkpoint of a stock transformers class."""

from moduli.surgery.compose.build import ComposeReport, compose, compose_recipe
from moduli.surgery.compose.plan import Plan
from moduli.surgery.compose.planning import plan
from moduli.surgery.compose.recipe import Recipe, Source, read_recipe

__all__ = [
    "ComposeReport",
    "Plan",
    "Recipe",
    "Source",
    "compose",
    "compose_recipe",
    "plan",
    "read_recipe",
]
