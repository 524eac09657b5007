"""GMoE: sparse mixture-of-experts are domain generalizable learners (ICLR 2023)."""

from moduli.methods.gmoe.config import GMoE

__all__ = ["GMoE"]
