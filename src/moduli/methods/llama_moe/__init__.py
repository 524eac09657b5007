"""LLaMA-MoE: building mixture-of-experts from LLaMA with continual pre-training (EMNLP 2024)."""

from moduli.methods.llama_moe.config import LlamaMoE

__all__ = ["LlamaMoE"]
