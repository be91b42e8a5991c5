"""Tag prediction on held-out clips, beside uniform guessing and the best constant answer."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xray.data import Dataset
from xray.evaluate.embed import embed_dataset
from xray.evaluate.errors import EvaluationError
from xray.models import TagClassifier

TOP = 5


def tag_numbers(sample_tags: Sequence[Sequence[str]], tags: Sequence[str]) -> list[set[int]]:
    """For each sample the places of its tags in the vocabulary; tags outside it are ignored."""
    number = {tag: place for place, tag in enumerate(tags)}
    return [{number[tag] for tag in own if tag in number} for own in sample_tags]


def top_tags(logits: Tensor) -> Tensor:
    """(N, V) logits to the five (at most V) likeliest tags, (N, 5) int64, best first; -1 in place of NaN."""
    # topk ranks NaN first, where it could hit by accident: it is sent to the end, and -1 never hits.
    values, places = logits.masked_fill(logits.isnan(), -torch.inf).topk(min(TOP, logits.shape[1]), dim=1)
    return places.masked_fill(values == -torch.inf, -1)


def tag_accuracy(top: Tensor, truth: Sequence[set[int]], classes: int) -> dict[str, Any]:
    """How often the predicted tags are among a sample's own.

    Samples without any known tag cannot be answered; they are left out and counted in ``without_tags``.

    Args:
        top: (N, k) int64, from :func:`top_tags`.
        truth: N sets, from :func:`tag_numbers`.
        classes: V, tags in the vocabulary.

    Returns:
        * ``top1``: share of samples whose likeliest tag is one of theirs; ``top5``: any of the first five is;
        * ``chance``: the expected ``top1`` of a tag drawn uniformly from the vocabulary, (mean tags per
          sample) / V; ``chance_top5`` the same for five different tags;
        * ``most_frequent``: ``top1`` of always answering the tag that is commonest *among these very
          samples*, the best any constant answer can do;
        * ``classes``, ``clips``, ``without_tags``, and ``distinct_predictions``, how many different tags were
          ever predicted first.

    Raises:
        EvaluationError: predictions and truth do not fit, or no sample has a known tag.
    """
    if top.ndim != 2 or len(top) != len(truth):
        raise EvaluationError(
            f"top must be (N, k) with one row per sample, got {tuple(top.shape)} for {len(truth)} samples"
        )
    known = [(row, own) for row, own in zip(top.tolist(), truth, strict=True) if own]
    if not known:
        raise EvaluationError(f"tag prediction needs at least 1 sample with a known tag, got 0 of {len(truth)} samples")
    chance_top5 = 0.0
    for row, own in known:
        miss = 1.0
        for drawn in range(len(row)):
            miss *= max(classes - len(own) - drawn, 0) / (classes - drawn)
        chance_top5 += (1 - miss) / len(known)
    counts = Counter(tag for _, own in known for tag in own)
    return {
        "top1": sum(row[0] in own for row, own in known) / len(known),
        "top5": sum(not own.isdisjoint(row) for row, own in known) / len(known),
        "classes": classes,
        "clips": len(known),
        "without_tags": len(truth) - len(known),
        "chance": counts.total() / len(known) / classes,
        "chance_top5": chance_top5,
        "most_frequent": max(counts.values()) / len(known),
        "distinct_predictions": len({row[0] for row, _ in known}),
    }


def clip_tags(
    model: TagClassifier,
    tags: Sequence[str],
    dataset: Dataset,
    *,
    batch_size: int = 32,
    keep_rate: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tag prediction over a dataset, meant for held-out clips: ``Dataset(root, "test", media="clip")``.

    Args:
        model: a trained ``TagClassifier``.
        tags: its vocabulary, in the order of its outputs.
        dataset: held-out samples.
        batch_size: samples a step.
        keep_rate: replaces the encoder's own EViT keep rate when given.
        progress: show a bar.

    Returns:
        What :func:`tag_accuracy` returns.

    Raises:
        EvaluationError: the vocabulary does not fit the model, or no sample carries a known tag.
    """
    if len(tags) != model.config.num_tags:
        raise EvaluationError(f"tags must name the model's {model.config.num_tags} outputs, got {len(tags)} names")
    embedded = embed_dataset(
        model,
        dataset,
        batch_size=batch_size,
        keep_rate=keep_rate,
        reduce=top_tags,
        progress=progress,
        title="clip tags",
    )
    return tag_accuracy(embedded.features, tag_numbers(embedded.tags, tags), len(tags))
