"""Who goes where: routers turn tokens into a `Routing` record.

A router is a module with one duty, `scores(x) -> [T, E]`; how scores become a routing (selection,
combine weights, noise, capacity) is a `Rule`, shared by all of them.
"""

from moduli.routing.avgk import AvgKRouter, gate_from_keys, key_means, retie
from moduli.routing.capacity import capacity, slots
from moduli.routing.learned import CosineRouter, LinearRouter
from moduli.routing.record import RouteContext, Routing
from moduli.routing.router import Router
from moduli.routing.rule import Rule, route

__all__ = [
    "AvgKRouter",
    "CosineRouter",
    "LinearRouter",
    "RouteContext",
    "Router",
    "Routing",
    "Rule",
    "capacity",
    "gate_from_keys",
    "key_means",
    "retie",
    "route",
    "slots",
]
