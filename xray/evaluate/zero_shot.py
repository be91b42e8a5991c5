"""Zero-shot classification: an image gets the class whose name, put into sentences, is nearest to it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xray.data import Dataset, Tokenizer
from xray.evaluate.embed import Embedded, embed_dataset, embed_texts
from xray.evaluate.errors import EvaluationError
from xray.evaluate.ranking import positive_ranks, recall
from xray.models import Clip

TEMPLATES = ("{}", "a picture of {}", "an icon of {}", "a drawing of {}", "{} symbol")


def class_name(label: str) -> str:
    """A label as words: "food-and_drink" becomes "food and drink"."""
    return " ".join(label.replace("-", " ").replace("_", " ").replace("&", " and ").split())


def class_features(
    model: Clip, tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """(C, D) unit features of the labels: the mean over the templates, normalised again."""
    if not templates or any("{}" not in template for template in templates):
        raise EvaluationError(
            f"templates must be one or more sentences with {{}} for the class name, got {list(templates)!r}"
        )
    sentences = [template.format(class_name(label)) for label in labels for template in templates]
    features = embed_texts(model, tokenizer, sentences)
    return F.normalize(features.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)


def classify(image_features: Tensor, class_features: Tensor, targets: Tensor) -> dict[str, Any]:
    """Accuracies of nearest-class prediction beside what guessing would give.

    Args:
        image_features: (N, D).
        class_features: (C, D).
        targets: (N,) int64, the right class of each image.

    Returns:
        ``top1``, ``top5``; ``mean_per_class`` (mean over classes of the accuracy within the class, so a
        frequent class does not dominate); ``chance`` = 1 / C and ``chance_top5``, what a uniform guess gets;
        ``most_frequent``, what always answering the commonest class *of these very images* gets, the best any
        constant answer can do (its ``mean_per_class`` is 1 / C); ``classes`` and ``images``.
    """
    classes, images = len(class_features), len(image_features)
    if not images or classes < 2:
        raise EvaluationError(
            f"zero-shot classification needs at least 1 image and 2 classes, got {images} images and {classes} classes"
        )
    ranks = positive_ranks(image_features, class_features, targets, torch.arange(classes))
    counts = torch.bincount(targets, minlength=classes)
    hits = torch.bincount(targets, weights=(ranks < 1).double(), minlength=classes)
    present = counts > 0
    return {
        "top1": recall(ranks, 1),
        "top5": recall(ranks, 5),
        "mean_per_class": float((hits[present] / counts[present]).mean()),
        "classes": classes,
        "images": images,
        "chance": 1 / classes,
        "chance_top5": min(1.0, 5 / classes),
        "most_frequent": float(counts.max()) / images,
        "per_class_accuracy": (hits / counts.clamp(min=1)).tolist(),
        "per_class_images": counts.tolist(),
    }


def zero_shot(
    model: Clip,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    templates: Sequence[str] = TEMPLATES,
    min_per_class: int = 5,
    batch_size: int = 64,
    keep_rate: float | None = None,
    embedded: Embedded | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Zero-shot classification of a dataset's labelled samples, with the dataset's own labels as the classes.

    Classes with fewer than ``min_per_class`` samples are left out, of the candidates too: their accuracy
    would be noise.

    Args:
        model: a trained ``Clip``.
        tokenizer: the one it was trained with.
        dataset: held-out samples; those with an empty label are ignored.
        templates: sentences with ``{}`` for the class name, averaged (Radford et al. 2021, section 3.1.4).
        min_per_class: samples that a class needs.
        batch_size: samples a step.
        keep_rate: replaces the encoder's own EViT keep rate when given.
        embedded: features of this dataset computed before, to save the time.
        progress: show a bar.

    Returns:
        What :func:`classify` returns, and ``per_class``, a list of ``{"name", "images", "accuracy"}``,
        largest first.

    Raises:
        EvaluationError: fewer than two classes have enough samples.
    """
    if embedded is None:
        embedded = embed_dataset(
            model, dataset, batch_size=batch_size, keep_rate=keep_rate, progress=progress, title="zero-shot"
        )
    counts = Counter(label for label in embedded.labels if label)
    labels = sorted(label for label, count in counts.items() if count >= min_per_class)
    if len(labels) < 2:
        raise EvaluationError(
            f"zero-shot classification needs at least 2 classes with {min_per_class} or more samples each, "
            f"and the dataset has {len(labels)} such classes of {len(counts)}"
        )
    number = {label: i for i, label in enumerate(labels)}
    rows = [i for i, label in enumerate(embedded.labels) if label in number]
    targets = torch.tensor([number[embedded.labels[i]] for i in rows])
    result = classify(embedded.features[rows], class_features(model, tokenizer, labels, templates), targets)
    accuracy, images = result.pop("per_class_accuracy"), result.pop("per_class_images")
    per_class = [
        {"name": class_name(label), "images": images[i], "accuracy": accuracy[i]} for label, i in number.items()
    ]
    return {**result, "per_class": sorted(per_class, key=lambda entry: (-entry["images"], entry["name"]))}
