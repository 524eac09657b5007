"""Whole architectures that are not surgery on another model, and the attention they need."""
