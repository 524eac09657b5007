"""EMoE: emergent modularity of pretrained FFNs (NAACL 2024)."""

from moduli.methods.emoe.config import EMoE

__all__ = ["EMoE"]
