"""Experts over several devices."""

from moduli.parallel.expert_parallel import expert_parallel_plan

__all__ = ["expert_parallel_plan"]
