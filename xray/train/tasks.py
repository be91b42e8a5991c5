"""The three tasks: each is a module that holds the model, turns a batch into tensors, and returns its loss.

A task is what the loop calls and what FSDP shards: everything that a step computes with parameters happens
inside `forward`, or inside `encode` where a batch comes in chunks.
"""

import json
import math
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xray import data, models, ops
from xray.models.layers import Block
from xray.train import schedule
from xray.train.errors import TrainError
from xray.train.grad_cache import cached_backward, plain_backward, split_batch
from xray.train.overrides import nearest
from xray.train.recipes import Recipe

LARGEST_LOGIT_SCALE = math.log(100)
MOST_LOGITS = 2**24  # formed for the accuracy of a step
MOST_CAPTIONS = 1_000_000  # read to train a tokenizer


def vision_config(recipe: Recipe) -> models.VisionConfig:
    """The encoder that a recipe asks for.

    Raises:
        TrainError: there is no size of that name, or an image size does not fit its patches.
    """
    if recipe.model not in models.SIZES:
        hint = nearest(recipe.model, models.SIZES) or f": the sizes are {', '.join(models.SIZES)}"
        raise TrainError(f"model is {recipe.model!r}, which is no size of xray.models{hint}")
    size = models.SIZES[recipe.model]
    schedule.check_image_sizes(recipe, size.patch_size)
    keep_rate = 1.0 if recipe.task == "mae" else recipe.keep_rate
    return replace(size, image_size=recipe.image_size, num_frames=recipe.num_frames, keep_rate=keep_rate)


def learn(recipe: Recipe, datasets: Sequence[data.Dataset]) -> dict[str, str]:
    """What a task takes from the training data before it starts: {"tags": JSON list} or {"tokenizer": JSON}.

    These strings also travel with checkpoints and with the final model.

    Raises:
        TrainError: the data hold no tags.
    """
    if recipe.task == "tags":
        counts = Counter(tag for dataset in datasets for tags in dataset.column("tags") for tag in set(tags))
        tags = [tag for tag, count in counts.items() if count >= recipe.min_tag_count]
        if not tags:
            raise TrainError(
                f"no tag of {recipe.data} occurs min_tag_count = {recipe.min_tag_count} times, the commonest "
                f"{max(counts.values(), default=0)} times: lower min_tag_count or give tagged data"
            )
        return {"tags": json.dumps(sorted(tags, key=lambda tag: (-counts[tag], tag)), ensure_ascii=False)}
    if recipe.task == "clip":
        columns = ((dataset.column("caption"), dataset.column("tags")) for dataset in datasets)
        pairs = (pair for captions, tags in columns for pair in zip(captions, tags, strict=True))
        texts = with_tags(islice(pairs, MOST_CAPTIONS), recipe.caption_tags)
        return {"tokenizer": data.Tokenizer.train(texts, recipe.vocab_size).to_json()}
    return {}


def with_tags(pairs: Iterable[tuple[str, Sequence[str]]], most: int) -> list[str]:
    """Captions, each with up to `most` of its tags that it does not say already: "red heart, love, card"."""
    texts = []
    for caption, tags in pairs:
        spoken = caption.casefold()
        unspoken = [tag for tag in tags if tag.casefold() not in spoken]
        texts.append(", ".join(part for part in [caption, *unspoken[:most]] if part))
    return texts


def shortened(texts: Sequence[str], tags: Sequence[Sequence[str]], share: float, source: random.Random) -> list[str]:
    """The texts, but about `share` of them replaced by one of the sample's tags, drawn from `source`."""
    draws = [(source.random(), source.random()) for _ in texts]
    return [
        own[int(place * len(own))] if own and chance < share else text
        for text, own, (chance, place) in zip(texts, tags, draws, strict=True)
    ]


def build(recipe: Recipe, artifacts: Mapping[str, str]) -> "Task":
    """The task of a recipe, with freshly initialised weights; `artifacts` is what `learn` returned."""
    if recipe.task == "tags":
        return TagTask(recipe, json.loads(artifacts["tags"]))
    if recipe.task == "clip":
        return ClipTask(recipe, data.Tokenizer.load(artifacts["tokenizer"]))
    return MaeTask(recipe)


class Task(nn.Module):
    """What the loop needs of a task.

    Attributes:
        model: the model that is trained and, in the end, saved.
        more_forwards: methods beside `forward` that compute with parameters, where FSDP is to gather them.
    """

    model: nn.Module
    more_forwards: tuple[str, ...] = ()

    @abstractmethod
    def inputs(self, batch: data.Batch, seed: int) -> dict[str, Any]:
        """The arguments of `forward` for a batch, on the CPU; `seed` decides what is drawn at random."""

    @abstractmethod
    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this process's samples and further metrics by name, scalars without gradient."""

    def accumulate(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the loss's gradients to the parameters'; what `forward` returns, without gradient.

        An autocast around it holds for the forward pass alone.
        """
        loss, extra = self(keep_rate, **inputs)
        plain_backward([loss])
        return loss.detach(), extra

    def settle(self) -> None:
        """Put parameters back into their allowed range after an optimizer step."""

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order: the units of compilation, checkpointing and sharding."""
        return [module for module in self.modules() if isinstance(module, Block)]


class MaeTask(Task):
    """Masked autoencoding of images, EViT off."""

    model: models.MaskedAutoencoder

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.model = models.MaskedAutoencoder(
            models.MaeConfig(
                vision=vision_config(recipe),
                decoder_width=recipe.decoder_width,
                decoder_depth=recipe.decoder_depth,
                decoder_heads=recipe.decoder_heads,
                mask_ratio=recipe.mask_ratio,
            )
        )

    def inputs(self, batch: data.Batch, seed: int) -> dict[str, Any]:
        """Pixels, and the source of this step's masks."""
        return {"pixels": batch.pixels, "generator": torch.Generator().manual_seed(seed)}

    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over the hidden patches."""
        return self.model(inputs["pixels"], generator=inputs["generator"]).loss, {}


class TagTask(Task):
    """Multi-tag classification of clips and images against 1/k on each of a sample's k tags."""

    model: models.TagClassifier

    def __init__(self, recipe: Recipe, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = list(tags)
        self.numbers = {tag: number for number, tag in enumerate(self.tags)}
        self.model = models.TagClassifier(models.TagConfig(vision=vision_config(recipe), num_tags=len(self.tags)))

    def inputs(self, batch: data.Batch, seed: int) -> dict[str, Any]:
        """Pixels, and the tags as rows of a sparse matrix: tag numbers (nnz,) and row offsets (B + 1,)."""
        rows = [sorted({self.numbers[tag] for tag in tags if tag in self.numbers}) for tags in batch.tags]
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
        return {
            "pixels": batch.pixels,
            "tags": torch.tensor([number for row in rows for number in row], dtype=torch.int64),
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        }

    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, and how often the likeliest tag is one of the sample's."""
        features = self.model.encoder(inputs["pixels"], keep_rate)
        weight: Tensor = self.model.head.weight
        bias: Tensor = self.model.head.bias
        if torch.is_autocast_enabled(features.device.type):
            dtype = torch.get_autocast_dtype(features.device.type)
            features, weight, bias = features.to(dtype), weight.to(dtype), bias.to(dtype)
        loss = ops.tag_loss(features, weight, inputs["tags"], inputs["offsets"], bias=bias)
        return loss, {"top1": self._top1(features, weight, bias, inputs["tags"], inputs["offsets"])}

    @torch.no_grad()
    def _top1(self, features: Tensor, weight: Tensor, bias: Tensor, tags: Tensor, offsets: Tensor) -> Tensor:
        """Top-1 accuracy over as many samples as keep the logits small, should there be a million tags."""
        rows = min(features.shape[0], max(1, MOST_LOGITS // weight.shape[0]))
        guess = torch.addmm(bias, features[:rows], weight.T).argmax(dim=1)
        row_of_tag = torch.bucketize(torch.arange(tags.numel(), device=tags.device), offsets[1:], right=True)
        counted = row_of_tag < rows
        row_of_tag = row_of_tag.clamp(max=rows - 1)
        hits = (guess[row_of_tag] == tags) & counted
        return hits.sum().float() / (offsets[1 : rows + 1] > offsets[:rows]).sum().clamp(min=1)


class ClipTask(Task):
    """Image-text contrast over the samples of all processes."""

    model: models.Clip
    more_forwards = ("encode",)

    def __init__(self, recipe: Recipe, tokenizer: data.Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.context_length = recipe.context_length
        self.caption_tags = recipe.caption_tags
        self.short_texts = recipe.short_texts
        self.chunk_size = recipe.chunk_size
        text = models.TextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=recipe.context_length,
            width=recipe.text_width,
            depth=recipe.text_depth,
            heads=recipe.text_heads,
        )
        self.model = models.Clip(models.ClipConfig(vision=vision_config(recipe), text=text, embed_dim=recipe.embed_dim))

    def inputs(self, batch: data.Batch, seed: int) -> dict[str, Any]:
        """Pixels and tokenised captions."""
        texts = with_tags(zip(batch.captions, batch.tags, strict=True), self.caption_tags)
        texts = shortened(texts, batch.tags, self.short_texts, random.Random(seed))
        token_ids, lengths = self.tokenizer(texts, self.context_length)
        return {"pixels": batch.pixels, "token_ids": token_ids, "lengths": lengths}

    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's share of the contrastive loss, and how well its pairs are found among all processes'."""
        output = self.model(inputs["pixels"], inputs["token_ids"], inputs["lengths"], keep_rate)
        loss, *ranks = self._loss(*output)
        return loss, self._metrics(output.logit_scale, *ranks)

    def encode(self, keep_rate: float | None, **inputs: Any) -> models.ClipOutput:
        """The features alone, for `accumulate`."""
        return self.model(inputs["pixels"], inputs["token_ids"], inputs["lengths"], keep_rate)

    def accumulate(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Task.accumulate`, with no more than `chunk_size` samples' activations alive where that is not 0."""
        if not self.chunk_size:
            return super().accumulate(keep_rate, **inputs)
        chunks = split_batch(inputs, self.chunk_size)
        ranks: list[Tensor] = []

        def loss_of(*output: Tensor) -> Tensor:
            loss, *ranks[:] = self._loss(*output)
            return loss

        loss, output = cached_backward(
            lambda chunk: self.encode(keep_rate, **chunk), chunks, loss_of, num_shared=1, modules=[self]
        )
        return loss, self._metrics(output[-1], *ranks)

    def _loss(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
        group = dist.group.WORLD if dist.is_initialized() else None
        return ops.clip_loss_with_ranks(image_features, text_features, logit_scale, group=group)

    @torch.no_grad()
    def _metrics(self, logit_scale: Tensor, image_ranks: Tensor, text_ranks: Tensor) -> dict[str, Tensor]:
        """Shares of pairs that are found first and among the first five in the batch, mean ranks, and the scale."""
        ways = {"image_to_text": image_ranks, "text_to_image": text_ranks, "": torch.cat([image_ranks, text_ranks])}
        values: dict[str, Tensor] = {}
        for way, ranks in ways.items():
            prefix = f"{way}_" if way else ""
            values |= {f"{prefix}top{k}": (ranks < k).float().mean() for k in (1, 5)}
            values[f"{prefix}rank"] = ranks.float().mean()
        return {**values, "logit_scale": logit_scale.detach().float().squeeze()}

    @torch.no_grad()
    def settle(self) -> None:
        """The scale of the logits stays at most 100, as in CLIP."""
        self.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
