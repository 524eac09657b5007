"""Kinds of tasks: one file each, found by name; see `moduli.training.kinds.base`."""
