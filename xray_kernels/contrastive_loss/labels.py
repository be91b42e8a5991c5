"""Which pairs of a batch are positives of each other, over all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xray_kernels.contrastive_loss import distributed


class Matching(NamedTuple):
    """Labels of all N texts, (N,) int32, those of this rank's n images, and the positives that each of these has.

    `positives` is None where that is one: images and texts in the order of their pairs.
    """

    text_labels: Tensor
    image_labels: Tensor
    positives: Tensor | None


def match(labels: Tensor | None, features: Tensor, group: Any) -> Matching:
    """The matching of this rank's pairs among those of the group `group`; None is this process alone."""
    n = features.shape[0]
    size, first = (1, 0) if group is None else distributed.place(features, group)
    own = slice(first, first + n)
    if labels is None:
        every = torch.arange(n * size, dtype=torch.int32, device=features.device)
        return Matching(every, every[own], None)
    gathered = labels.long() if group is None else distributed.all_gather(labels.long(), group)
    ordered = gathered.sort().values
    # a label becomes the first place where it stands in order: 32 bits, and no shape that depends on values
    every = torch.searchsorted(ordered, gathered, out_int32=True)
    ends = torch.searchsorted(ordered, gathered[own], right=True)
    return Matching(every, every[own], ends - every[own])
