"""THOR: taming sparsely activated transformer with stochastic experts (ICLR 2022)."""

from moduli.methods.thor.config import THOR
from moduli.methods.thor.inference import set_inference, thor_report
from moduli.methods.thor.passes import last_step, start_step

__all__ = ["THOR", "last_step", "set_inference", "start_step", "thor_report"]
