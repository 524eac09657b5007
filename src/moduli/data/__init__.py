"""Real models and data by name; tasks with domains and splits without leaks."""

from moduli.data.fetching import cache_dir, fetch, fetchable, resolve_model
from moduli.data.packages import Package

__all__ = ["Package", "cache_dir", "fetch", "fetchable", "resolve_model"]
