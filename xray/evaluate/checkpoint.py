"""`xray eval CHECKPOINT`: the evaluation that fits the kind of model a checkpoint holds."""

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xray import data, models
from xray.evaluate.embed import embed_dataset
from xray.evaluate.errors import EvaluationError
from xray.evaluate.retrieval import retrieval
from xray.evaluate.tags import clip_tags
from xray.evaluate.zero_shot import zero_shot


def evaluate_checkpoint(
    checkpoint: str | Path,
    dataset: str | Path,
    *,
    split: str = "test",
    media: str | None = None,
    batch_size: int = 64,
    keep_rate: float | None = None,
    min_per_class: int = 5,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a trained model on a packed dataset.

    Args:
        checkpoint: a ``.safetensors`` file, or the folder of a finished run.
        dataset: a folder written by ``xray data pack``.
        split: "test" or "train".
        media: "image" or "clip"; None takes what fits the model: images for CLIP and masked autoencoders,
            clips for tags.
        batch_size: samples a step.
        keep_rate: replaces the encoder's own EViT keep rate when given.
        min_per_class: samples that a class needs to take part in zero-shot classification.
        device: "cpu", "cuda" or another of PyTorch's; None takes the GPU where there is one.
        progress: show a bar.

    Returns:
        ``kind`` and ``samples``, and with it: for "clip" ``retrieval`` and ``zero_shot`` (absent when fewer
        than two classes have enough samples, with the cause in ``zero_shot_missing``); for "tags"
        ``clip_tags``; for "mae" ``reconstruction`` with the mean ``loss`` over fixed masks.

    Raises:
        EvaluationError: the checkpoint or the data cannot be evaluated.
        CheckpointError: the checkpoint cannot be read.
        DataError: the data cannot be read.
    """
    path = Path(checkpoint)
    model, header = models.load(path / "model.safetensors" if path.is_dir() else path)
    kind = header["kind"]
    if kind not in ("clip", "tags", "mae"):
        raise EvaluationError(f"{path} holds a {kind!r} model, and clip, tags or mae can be evaluated")
    media = media or ("clip" if kind == "tags" else "image")
    samples = data.Dataset(dataset, split, media=media)
    if not len(samples):
        raise EvaluationError(
            f"{dataset} holds no {media} in its {split} split, and at least one is needed to evaluate {path}"
        )
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"device is {device!r}, which cannot be used here: {reason}") from error
    options: dict[str, Any] = {"batch_size": batch_size, "keep_rate": keep_rate, "progress": progress}
    result: dict[str, Any] = {"kind": kind, "samples": len(samples)}
    if isinstance(model, models.Clip):
        tokenizer = data.Tokenizer.load(_extra(path, header, "tokenizer"))
        embedded = embed_dataset(model, samples, **options)
        result["skipped"] = len(embedded.skipped)
        result["retrieval"] = retrieval(model, tokenizer, samples, embedded=embedded)
        try:
            result["zero_shot"] = zero_shot(model, tokenizer, samples, embedded=embedded, min_per_class=min_per_class)
        except EvaluationError as error:
            result["zero_shot_missing"] = str(error)
    elif isinstance(model, models.TagClassifier):
        result["clip_tags"] = clip_tags(model, json.loads(_extra(path, header, "tags")), samples, **options)
    elif isinstance(model, models.MaskedAutoencoder):
        result["reconstruction"] = reconstruction_loss(model, samples, batch_size=batch_size, progress=progress)
    return result


def _extra(path: Path, header: dict[str, str], name: str) -> str:
    """One of the strings that training saves with a model."""
    if name not in header:
        raise EvaluationError(f"{path} was saved without its {name}, and it cannot be evaluated without them")
    return header[name]


def reconstruction_loss(
    model: models.MaskedAutoencoder, dataset: data.Dataset, *, batch_size: int = 64, progress: bool = True
) -> dict[str, Any]:
    """Mean error of a masked autoencoder on hidden patches, ``{"loss", "images"}``, with fixed masks.

    The targets have variance 1, so predicting each patch's mean gives a loss of 1.
    """
    vision = model.config.vision
    transform = data.transforms.evaluate(vision.image_size, 1)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    total, images = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        batches = data.sequential(dataset, batch_size, transform)
        with (
            torch.inference_mode(),
            tqdm(total=len(dataset), desc="reconstruction", disable=None if progress else True) as bar,
        ):
            for batch in batches:
                total += float(model(batch.pixels.to(device), generator=generator).loss) * len(batch)
                images += len(batch)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    if not images:
        raise EvaluationError(f"{dataset} has no readable sample to reconstruct")
    return {"loss": total / images, "images": images}
