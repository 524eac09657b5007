"""Partitions of the neurons of an FFN into experts, and how good they are."""

from moduli.surgery.partition.balanced import balanced_clusters
from moduli.surgery.partition.coactivation import Coactivation
from moduli.surgery.partition.graph import coactivation_labels, rebalance
from moduli.surgery.partition.importance import (
    SharedSplit,
    greedy_labels,
    inner_sharing_members,
    inter_sharing,
    kmeans_groups,
    neuron_importance,
)
from moduli.surgery.partition.named import NamedSplit, named_labels
from moduli.surgery.partition.observe import Sample, observe, require_data
from moduli.surgery.partition.quality import SplitQuality, explained_variance, split_quality
from moduli.surgery.partition.sizes import balanced_sizes, contiguous_labels, random_labels

__all__ = [
    "Coactivation",
    "NamedSplit",
    "Sample",
    "SharedSplit",
    "SplitQuality",
    "balanced_clusters",
    "balanced_sizes",
    "coactivation_labels",
    "contiguous_labels",
    "explained_variance",
    "greedy_labels",
    "inner_sharing_members",
    "inter_sharing",
    "kmeans_groups",
    "named_labels",
    "neuron_importance",
    "observe",
    "random_labels",
    "rebalance",
    "require_data",
    "split_quality",
]
