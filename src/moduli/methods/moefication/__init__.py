"""MoEfication: transformer feed-forward layers are mixtures of experts (ACL Findings 2022)."""

from moduli.methods.moefication.config import MoEfication
from moduli.methods.moefication.fit import fit_routers

__all__ = ["MoEfication", "fit_routers"]
