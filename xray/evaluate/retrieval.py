"""Retrieval both ways: the image for a caption, and the caption for an image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xray.data import Dataset, Tokenizer
from xray.evaluate.embed import Embedded, embed_dataset, embed_texts
from xray.evaluate.errors import EvaluationError
from xray.evaluate.ranking import positive_ranks, recall
from xray.models import Clip

RECALL_AT = (1, 5, 10)


def group_captions(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct captions, in order of first appearance, and for each input caption which of them it is.

    Captions are the same when they differ only in letter case or spacing.

    Returns:
        (distinct captions as first written, (N,) int64).
    """
    first: dict[str, int] = {}
    distinct: list[str] = []
    groups = []
    for caption in captions:
        key = " ".join(caption.casefold().split())
        if key not in first:
            first[key] = len(distinct)
            distinct.append(caption)
        groups.append(first[key])
    return distinct, torch.tensor(groups, dtype=torch.int64)


def recalls(image_features: Tensor, caption_features: Tensor, groups: Tensor, *, tile: int = 2048) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from features.

    Many pictures carry the same caption ("red heart"), and nobody could say which of them a query meant. So
    identical captions are one group, and everything in the group is right:

    * text to image: each *distinct* caption asks once, all images are ranked, and any image of its group
      answers it;
    * image to text: each image asks once, the distinct captions are ranked, and its own caption answers it.

    With ``candidates`` = the number U of distinct captions, k / U is exactly what random features get from
    image to text. From text to image a caption with m images among N is met with probability at most k m / N,
    whose mean over the U captions is k / U again, so the one number is an honest bar for both ways (and exact
    when no caption repeats).

    Args:
        image_features: (N, D).
        caption_features: (U, D), one row per distinct caption.
        groups: (N,) int64, the caption of each image.
        tile: side of the largest block of similarities held in memory.

    Returns:
        ``text_to_image`` and ``image_to_text``, each with ``r@1``, ``r@5``, ``r@10`` and ``median_rank`` (1
        is best); ``candidates``, ``images``, and ``chance_r@1``, ``chance_r@5``, ``chance_r@10``.
    """
    images, candidates = len(image_features), len(caption_features)
    if not images:
        raise EvaluationError("retrieval needs at least 1 captioned image, got 0")
    ids = torch.arange(candidates)
    result: dict[str, Any] = {}
    for name, ranks in (
        ("text_to_image", positive_ranks(caption_features, image_features, ids, groups, tile=tile)),
        ("image_to_text", positive_ranks(image_features, caption_features, groups, ids, tile=tile)),
    ):
        result[name] = {f"r@{k}": recall(ranks, k) for k in RECALL_AT}
        result[name]["median_rank"] = int(ranks.median()) + 1
    result.update(candidates=candidates, images=images)
    result.update({f"chance_r@{k}": min(1.0, k / candidates) for k in RECALL_AT})
    return result


def retrieval(
    model: Clip,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    keep_rate: float | None = None,
    embedded: Embedded | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Text-to-image and image-to-text retrieval over all captioned samples of a dataset.

    Args:
        model: a trained ``Clip``.
        tokenizer: the one it was trained with.
        dataset: held-out samples.
        batch_size: samples a step.
        keep_rate: replaces the encoder's own EViT keep rate when given.
        embedded: features of this dataset computed before, to save the time.
        progress: show a bar.

    Returns:
        What :func:`recalls` returns; read there how repeated captions and chance are counted.

    Raises:
        EvaluationError: no sample has a caption.
    """
    if embedded is None:
        embedded = embed_dataset(
            model, dataset, batch_size=batch_size, keep_rate=keep_rate, progress=progress, title="retrieval"
        )
    rows = [i for i, caption in enumerate(embedded.captions) if caption.strip()]
    distinct, groups = group_captions([embedded.captions[i] for i in rows])
    if not rows:
        raise EvaluationError("retrieval needs at least 1 captioned image, got 0")
    return recalls(embedded.features[rows], embed_texts(model, tokenizer, distinct), groups)
