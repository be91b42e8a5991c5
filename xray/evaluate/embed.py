"""Features of a whole dataset, or of many sentences, batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xray.data import Dataset, DecodeError, Sample, Tokenizer, transforms
from xray.evaluate.errors import EvaluationError
from xray.models import Clip, MaskedAutoencoder, TagClassifier, VisionConfig, VisionTransformer


@dataclass(frozen=True)
class Embedded:
    """What a model made of a dataset, row by row.

    Attributes:
        features: (N, D) on the CPU, float32 (or what ``reduce`` makes of it).
        positions: the place of each row in the dataset.
        captions, tags, labels, ids: of each row.
        skipped: (id, reason) of the samples that could not be read.
    """

    features: Tensor
    positions: list[int]
    captions: list[str]
    tags: list[list[str]]
    labels: list[str]
    ids: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.positions)


def vision_config(model: nn.Module) -> VisionConfig:
    """The image encoder's configuration of any model that has one."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision", config)
    if not isinstance(config, VisionConfig):
        raise TypeError(f"model must have an image encoder, got {type(model).__name__}")
    return config


def _encode(model: nn.Module) -> Callable[[Tensor, float | None], Tensor]:
    """What this kind of model gives: CLIP's embedding, the tag logits, else the class token."""
    if isinstance(model, Clip):
        return model.encode_image
    if isinstance(model, TagClassifier | VisionTransformer):
        return model
    if isinstance(model, MaskedAutoencoder):
        return model.encoder
    raise TypeError(f"model must have an image encoder, got {type(model).__name__}")


def embed_dataset(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    keep_rate: float | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
    title: str = "embed",
) -> Embedded:
    """Run every sample of a dataset, image or clip, through a model's image encoder.

    Samples that cannot be read are left out and named in ``skipped``: replacing them, as training does, would
    count others twice. The model is put into evaluation mode for the time of the call.

    Args:
        model: a ``Clip`` (gives unit embeddings), ``TagClassifier`` (tag logits), ``VisionTransformer`` or
            ``MaskedAutoencoder`` (the class token).
        dataset: what to embed, in its order.
        batch_size: samples a step.
        keep_rate: replaces the encoder's own EViT keep rate when given.
        reduce: applied to each batch of features before they are kept, for example to keep only the best of
            a million logits.
        progress: show a bar.
        title: what the bar says.

    Raises:
        EvaluationError: no sample, or a batch size below 1.
        TypeError: a model without an image encoder.
    """
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, got {batch_size}")
    config, encode = vision_config(model), _encode(model)
    transform = transforms.evaluate(config.image_size, config.num_frames)
    device = next(model.parameters()).device
    rows: dict[int, Tensor] = {}
    samples: dict[int, Sample] = {}
    skipped: list[tuple[str, str]] = []
    pending: dict[str, list[tuple[int, Tensor]]] = {}

    def flush(shape: str) -> None:
        batch = pending.pop(shape, [])
        if batch:
            features = encode(torch.stack([pixels for _, pixels in batch]).to(device), keep_rate).float()
            features = (features if reduce is None else reduce(features)).cpu()
            rows.update(zip((i for i, _ in batch), features, strict=True))

    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            tqdm(total=len(dataset), desc=title, disable=None if progress else True, leave=False) as bar,
        ):
            for i in range(len(dataset)):
                bar.update()
                try:
                    sample = dataset[i]
                    pixels = transform(sample, None)
                except DecodeError as error:
                    skipped.append((dataset.index["id"][i].as_py(), str(error)))
                    continue
                # Images and clips of different lengths cannot share a batch.
                shape = str(tuple(pixels.shape))
                samples[i] = sample
                pending.setdefault(shape, []).append((i, pixels))
                if len(pending[shape]) == batch_size:
                    flush(shape)
            for shape in list(pending):
                flush(shape)
    finally:
        model.train(was_training)
    if not rows:
        raise EvaluationError(
            f"the dataset has {len(dataset)} samples, {len(skipped)} of them unreadable, and at least one "
            "that can be read is needed"
        )
    order = sorted(rows)
    return Embedded(
        torch.stack([rows[i] for i in order]).clone(),
        order,
        [samples[i].caption for i in order],
        [list(samples[i].tags) for i in order],
        [samples[i].label for i in order],
        [samples[i].id for i in order],
        skipped,
    )


def embed_texts(model: Clip, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """(N, D) float32 unit embeddings of sentences, on the CPU, in their order."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            features = []
            for start in range(0, len(texts), batch_size):
                ids, lengths = tokenizer(list(texts[start : start + batch_size]), model.config.text.context_length)
                features.append(model.encode_text(ids.to(device), lengths.to(device)).float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(features).clone() if features else torch.zeros(0, model.config.embed_dim)
