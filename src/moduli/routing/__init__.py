"""Who goes where: routers turn tokens into a `Routing` record.

A router is a module with one duty, `scores(x) -> [T, E]`; how scores become a routing (selection,
combine weights, noise, capacity) is a `Rule`, shared by all of them.
"""

from moduli.routing.avgk import AvgKRouter, gate_from_keys, key_means, retie
from moduli.routing.capacity import Capacity, capacity, slots
from moduli.routing.expert_choice import ExpertChoiceRouter
from moduli.routing.hashed import HashRouter
from moduli.routing.learned import CosineRouter, LinearRouter
from moduli.routing.llama_moe import NoisyRouting, NoisyTopKRouter
from moduli.routing.moefication import GroundTruthRouter, MLPRouter, SimilarityRouter
from moduli.routing.record import RouteContext, Routing
from moduli.routing.router import Router
from moduli.routing.rule import Rule, route
from moduli.routing.switch import SwitchRouter

__all__ = [
    "AvgKRouter",
    "Capacity",
    "CosineRouter",
    "ExpertChoiceRouter",
    "GroundTruthRouter",
    "HashRouter",
    "LinearRouter",
    "MLPRouter",
    "NoisyRouting",
    "NoisyTopKRouter",
    "RouteContext",
    "Router",
    "Routing",
    "Rule",
    "SimilarityRouter",
    "SwitchRouter",
    "capacity",
    "gate_from_keys",
    "key_means",
    "retie",
    "route",
    "slots",
]
