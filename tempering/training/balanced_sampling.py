"""Draw the samples of a training loader so that every class is seen equally often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler

from tempering.data.batches import ShardedLoader
from tempering.rows import is_labeled
from tempering.training.batch_changes import dataset_labels


def balanced(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of the same data that draws samples with replacement, each class with the same probability.

    Unlabeled samples keep their share. A DataLoader gets torch's ``WeightedRandomSampler``.

    Raises:
        ValueError: for a loader whose labels are not known, or that has no order of its own.
    """
    labels = dataset_labels(loader)
    if labels is not None and not len(labels):
        return loader  # the run says that there is nothing to learn from
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            "balanced_sampling= (--balanced-sampling) draws samples by their class, and the loader has no class index "
            "per sample in its labels or in its dataset's labels or targets. Give a DataLoader with torch's "
            "WeightedRandomSampler."
        )
    weights = balanced_weights(labels)
    if isinstance(loader, ShardedLoader):
        return loader.weighted(weights)
    plain: Any = loader
    if not isinstance(plain, DataLoader) or plain.batch_size is None:
        raise ValueError(
            "balanced_sampling= (--balanced-sampling) changes the order of a DataLoader with a batch size or of a "
            f"loader of tempering.data; got {type(loader).__name__}. Draw the samples in the loader."
        )
    size = len(cast("Any", plain).dataset)
    if len(labels) != size:
        raise ValueError(
            f"balanced_sampling= (--balanced-sampling) needs a label per sample; the data set has {len(labels)} labels "
            f"or targets and {size} samples."
        )
    from lightning_fabric.utilities import data as of_fabric

    sampler = WeightedRandomSampler([float(weight) for weight in weights], len(weights))
    return cast("Any", of_fabric)._update_dataloader(plain, sampler)


def balanced_weights(labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the relative probability of every sample, 1 on average: the same sum for every class that occurs."""
    known = is_labeled(labels)
    weights = torch.ones(len(labels), dtype=torch.float64)
    classes = labels[known]
    counts = torch.bincount(classes)
    weights[known] = len(classes) / (int((counts > 0).sum()) * counts.double())[classes]
    return weights
