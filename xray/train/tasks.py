"""The three tasks: each is a module that holds the model, turns a batch into tensors, and returns its loss.

A task is what the loop calls and what FSDP shards: everything that a step computes with parameters happens
inside `forward`, or inside `encode` where a batch comes in chunks.
"""

import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
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
MOST_LOGITS = 2**24  # formed for the accuracy of a step, over all processes
MOST_CAPTIONS = 1_000_000  # read to train a tokenizer, or to count tags in a stream


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


def model_config(recipe: Recipe, words: int) -> models.MaeConfig | models.TagConfig | models.ClipConfig:
    """The model that a recipe asks for; `words` is the number of tags, or of the tokenizer's ids.

    Raises:
        TrainError: as `vision_config`.
    """
    vision = vision_config(recipe)
    if recipe.task == "tags":
        return models.TagConfig(vision=vision, num_tags=words)
    if recipe.task == "clip":
        text = models.TextConfig(
            vocab_size=words,
            context_length=recipe.context_length,
            width=recipe.text_width,
            depth=recipe.text_depth,
            heads=recipe.text_heads,
        )
        return models.ClipConfig(vision=vision, text=text, embed_dim=recipe.embed_dim)
    return models.MaeConfig(
        vision=vision,
        decoder_width=recipe.decoder_width,
        decoder_depth=recipe.decoder_depth,
        decoder_heads=recipe.decoder_heads,
        mask_ratio=recipe.mask_ratio,
    )


def learn(recipe: Recipe, texts: Iterable[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """What a task takes from the training data before it starts: {"tags": JSON list} or {"tokenizer": JSON}.

    These strings also travel with checkpoints and with the final model.

    Args:
        recipe: the run's.
        texts: caption and tags of the training samples; clip reads `MOST_CAPTIONS` of them at most.

    Raises:
        TrainError: the data hold no tags.
    """
    if recipe.task == "tags":
        counts = Counter(tag for _, tags in texts for tag in set(tags))
        tags = [tag for tag, count in counts.items() if count >= recipe.min_tag_count]
        if not tags:
            raise TrainError(
                f"no tag of {recipe.data} occurs min_tag_count = {recipe.min_tag_count} times, the commonest "
                f"{max(counts.values(), default=0)} times: lower min_tag_count or give tagged data"
            )
        return {"tags": json.dumps(sorted(tags, key=lambda tag: (-counts[tag], tag)), ensure_ascii=False)}
    if recipe.task == "clip":
        captions = data.with_tags(islice(texts, MOST_CAPTIONS), recipe.caption_tags)
        return {"tokenizer": data.Tokenizer.train(captions, recipe.vocab_size).to_json()}
    return {}


def shortened(texts: Sequence[str], tags: Sequence[Sequence[str]], share: float, draws: np.ndarray) -> list[str]:
    """The texts, but about `share` of them replaced by one of the sample's tags; `draws` (B, 2) decides in [0, 1)."""
    return [
        own[int(place * len(own))] if own and chance < share else text
        for text, own, (chance, place) in zip(texts, tags, draws.tolist(), strict=True)
    ]


def uniform_rows(seed: int, first: int, count: int, width: int) -> np.ndarray:
    """Rows `first` to `first + count` of an endless (rows, width) float64 matrix, uniform in [0, 1), that `seed` fixes.

    A counter-based generator (Philox; Salmon et al., SC 2011) starts at any row, so what is drawn for a sample depends
    on its place in the global batch and not on how many processes share that batch.
    """
    blocks = -(-width // 4)  # it makes four numbers a count
    source = np.random.Generator(np.random.Philox(key=seed, counter=first * blocks))
    return source.random((count, 4 * blocks))[:, :width]


def over_ranks(counts: Tensor) -> Tensor:
    """The sum of a small tensor over all processes."""
    if dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


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
    def inputs(self, batch: data.Batch, seed: int, first: int = 0, total: int | None = None) -> dict[str, Any]:
        """The arguments of `forward` for this process's part of a step's batch, on the CPU.

        Args:
            batch: the part.
            seed: of this step, the same on all processes; it decides what is drawn at random.
            first: the place of the part's first sample in the whole batch.
            total: samples of the whole batch; None for as many as the part has.
        """

    @abstractmethod
    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's share of the loss, and of further metrics by name, scalars without gradient.

        A share's mean over all processes is the number of the whole batch, as is the mean of shares' gradients.
        """

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
        config = model_config(recipe, 0)
        assert isinstance(config, models.MaeConfig)
        self.model = models.MaskedAutoencoder(config)

    def inputs(self, batch: data.Batch, seed: int, first: int = 0, total: int | None = None) -> dict[str, Any]:
        """Pixels, and a number for each patch that decides what is hidden, (B, N) float32."""
        num_patches = (batch.pixels.shape[-1] // self.model.config.vision.patch_size) ** 2
        noise = uniform_rows(seed, first, len(batch), num_patches)
        return {"pixels": batch.pixels, "noise": torch.from_numpy(noise.astype(np.float32))}

    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over the hidden patches, as many in each sample."""
        return self.model(inputs["pixels"], noise=inputs["noise"]).loss, {}


class TagTask(Task):
    """Multi-tag classification of clips and images against 1/k on each of a sample's k tags."""

    model: models.TagClassifier

    def __init__(self, recipe: Recipe, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = list(tags)
        self.numbers = {tag: number for number, tag in enumerate(self.tags)}
        config = model_config(recipe, len(self.tags))
        assert isinstance(config, models.TagConfig)
        self.model = models.TagClassifier(config)

    def inputs(self, batch: data.Batch, seed: int, first: int = 0, total: int | None = None) -> dict[str, Any]:
        """Pixels, the tags as rows of a sparse matrix, and which rows are guessed.

        Tag numbers (nnz,) and row offsets (B + 1,); `scored` is the slice of rows whose likeliest tag is looked up, all
        or as many of the whole batch, evenly spread, as keep the logits small, should there be a million tags;
        `counts` (2,) float32 are the rows that have tags, of all and of those.
        """
        rows = [sorted({self.numbers[tag] for tag in tags if tag in self.numbers}) for tags in batch.tags]
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
        stride = -(-(total or len(batch)) * len(self.tags) // MOST_LOGITS)
        scored = slice(-first % stride, None, stride)
        return {
            "pixels": batch.pixels,
            "tags": torch.tensor([number for row in rows for number in row], dtype=torch.int64),
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
            "scored": scored,
            "counts": torch.tensor([sum(map(bool, rows)), sum(map(bool, rows[scored]))], dtype=torch.float32),
        }

    def forward(self, keep_rate: float | None, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the samples that have tags, and how often the likeliest tag is one of the sample's."""
        features = self.model.encoder(inputs["pixels"], keep_rate)
        tags, offsets, scored, counts = (inputs[name] for name in ("tags", "offsets", "scored", "counts"))
        loss, guess = self.model.head.loss(features, tags, offsets, scored)
        # The loss is a mean over this process's samples with tags, of which another may have more or fewer.
        world = dist.get_world_size() if dist.is_initialized() else 1
        weights = world / over_ranks(counts).clamp(min=1)
        hits = _hits(guess, tags, offsets, scored)
        return loss * (counts[0] * weights[0]), {"top1": hits * weights[1]}


@torch.no_grad()
def _hits(guess: Tensor, tags: Tensor, offsets: Tensor, scored: slice) -> Tensor:
    """How many of the rows in `scored` have their `guess` among their tags."""
    row_of_tag = torch.bucketize(torch.arange(tags.numel(), device=tags.device), offsets[1:], right=True)
    guesses = torch.full_like(offsets[1:], -1)  # of a row that is not scored: no tag
    guesses[scored] = guess
    return (guesses[row_of_tag] == tags).sum().float()


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
        self.exchange = recipe.exchange
        config = model_config(recipe, tokenizer.vocab_size)
        assert isinstance(config, models.ClipConfig)
        self.model = models.Clip(config)

    def inputs(self, batch: data.Batch, seed: int, first: int = 0, total: int | None = None) -> dict[str, Any]:
        """Pixels and tokenised captions."""
        texts = data.with_tags(zip(batch.captions, batch.tags, strict=True), self.caption_tags)
        texts = shortened(texts, batch.tags, self.short_texts, uniform_rows(seed, first, len(batch), 2))
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
        return ops.clip_loss_with_ranks(image_features, text_features, logit_scale, group=group, exchange=self.exchange)

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
