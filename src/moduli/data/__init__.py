"""Real models and data by name; tasks with domains and splits without leaks."""

from moduli.cache import cache_dir
from moduli.data.fetching import fetch, fetchable, resolve_model
from moduli.data.loading import load_task, task_names
from moduli.data.packages import Package
from moduli.data.task import DataOptions, Splits, Task

__all__ = [
    "DataOptions",
    "Package",
    "Splits",
    "Task",
    "cache_dir",
    "fetch",
    "fetchable",
    "load_task",
    "resolve_model",
    "task_names",
]
