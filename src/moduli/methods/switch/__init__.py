"""Switch Transformer (top-1) and GShard (top-2): copies of FFNs behind a linear gate."""

from moduli.methods.switch.config import Switch

__all__ = ["Switch"]
