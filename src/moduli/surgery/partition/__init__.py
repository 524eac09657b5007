"""Partitions of the neurons of an FFN into experts, and how good they are."""

from moduli.surgery.partition.pairswap import balanced_clusters
from moduli.surgery.partition.quality import SplitQuality, explained_variance, split_quality
from moduli.surgery.partition.sizes import balanced_sizes, contiguous_labels, random_labels

__all__ = [
    "SplitQuality",
    "balanced_clusters",
    "balanced_sizes",
    "contiguous_labels",
    "explained_variance",
    "random_labels",
    "split_quality",
]
