"""The pictures of the report: retrievals, reconstructions, surviving patches, tagged clips."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from xray.data import Dataset, DecodeError, Sample, Tokenizer, transforms
from xray.evaluate.embed import Embedded, embed_texts, vision_config
from xray.evaluate.ranking import positive_ranks
from xray.evaluate.retrieval import group_captions
from xray.models import Clip, MaskedAutoencoder, TagClassifier
from xray.ops import token_map

THUMBNAIL = 112


@dataclass(frozen=True)
class Result:
    """One retrieved picture; ``right`` when its caption is the query's."""

    picture: Image.Image
    caption: str
    right: bool


@dataclass(frozen=True)
class Retrieval:
    """A query, the 1-based rank of its best right picture, and the first five results."""

    query: str
    rank: int
    results: list[Result]


@dataclass(frozen=True)
class Step:
    """The input after an EViT layer: dropped patches faded, and how many are left."""

    name: str
    patches: int
    picture: Image.Image


@dataclass(frozen=True)
class Survivors:
    """A sample ("image" or "clip") on its way through the EViT layers."""

    title: str
    kind: str
    steps: list[Step]


@dataclass(frozen=True)
class TaggedClip:
    """A clip's frames side by side, and its likeliest tags, each with whether it is right."""

    caption: str
    picture: Image.Image
    predicted: list[tuple[str, bool]]


@dataclass
class Pictures:
    """All that the report shows; an empty list leaves its section out."""

    retrievals: list[Retrieval] = field(default_factory=list)
    reconstructions: list[tuple[Image.Image, Image.Image, Image.Image]] = field(default_factory=list)
    mask_ratio: float = 0.75
    survivors: list[Survivors] = field(default_factory=list)
    clips: list[TaggedClip] = field(default_factory=list)


def data_uri(picture: Image.Image) -> str:
    """The picture as a WebP data URI."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def to_picture(pixels: Tensor) -> Image.Image:
    """Normalised pixels (3, H, W), or (3, T, H, W) with its frames side by side, as a picture."""
    if pixels.ndim == 4:
        pixels = pixels.permute(0, 2, 1, 3).flatten(2)
    return Image.fromarray(transforms.denormalize(pixels).permute(1, 2, 0).numpy())


def draw(seed: int, total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, a fixed random draw, in increasing order."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())


def readable(dataset: Dataset, positions: Iterable[int], count: int) -> list[Sample]:
    """The first ``count`` of these samples that can be read."""
    samples: list[Sample] = []
    for position in positions:
        if len(samples) == count:
            break
        try:
            samples.append(dataset[position])
        except DecodeError:
            continue
    return samples


def thumbnail(sample: Sample, size: int = THUMBNAIL) -> Image.Image:
    """The first picture, its longer side at most ``size``, centred on a white square."""
    picture = sample.frames[0]
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def retrievals(
    model: Clip, tokenizer: Tokenizer, dataset: Dataset, embedded: Embedded, *, count: int = 8, seed: int = 0
) -> list[Retrieval]:
    """Randomly drawn captions of ``embedded`` and the pictures nearest to them among all of it."""
    rows = [i for i, caption in enumerate(embedded.captions) if caption.strip()]
    distinct, groups = group_captions([embedded.captions[i] for i in rows])
    chosen = draw(seed, len(distinct), count)
    queries = embed_texts(model, tokenizer, [distinct[i] for i in chosen])
    images = embedded.features[rows]
    ranks = positive_ranks(queries, images, torch.tensor(chosen), groups)
    best = (queries @ images.T).topk(min(5, len(rows)), dim=1).indices
    found = []
    for number, query in enumerate(chosen):
        results = []
        for row in best[number].tolist():
            sample = dataset[embedded.positions[rows[row]]]
            results.append(Result(thumbnail(sample), sample.caption, int(groups[row]) == query))
        found.append(Retrieval(distinct[query], int(ranks[number]) + 1, results))
    return found


def reconstructions(
    model: MaskedAutoencoder, dataset: Dataset, *, count: int = 6, seed: int = 0
) -> list[tuple[Image.Image, Image.Image, Image.Image]]:
    """(original, masked, filled in) for randomly drawn images."""
    config = model.config.vision
    samples = readable(dataset, draw(seed, len(dataset), 2 * count), count)
    if not samples:
        return []
    transform = transforms.evaluate(config.image_size, 1)
    pixels = torch.stack([_single(transform(sample, None)) for sample in samples])
    model.eval()
    with torch.no_grad():
        mask = model(pixels, torch.Generator().manual_seed(seed)).mask
        filled = model.reconstruct(pixels, torch.Generator().manual_seed(seed))
        hidden = model.hide(pixels, mask, 0.45)
    return [
        (to_picture(image), to_picture(dark), to_picture(full))
        for image, dark, full in zip(pixels, hidden, filled, strict=True)
    ]


def _single(pixels: Tensor) -> Tensor:
    """The first frame, if these are frames."""
    return pixels[:, 0] if pixels.ndim == 4 else pixels


def fade(pixels: Tensor, alive: Tensor, patch_size: int) -> Tensor:
    """Blends the patches that are not alive nearly to white.

    Args:
        pixels: (3, T, H, W), normalised.
        alive: (T * patches per frame,) bool, frame by frame, row by row.
        patch_size: side of a patch in pixels.
    """
    frames, height, width = pixels.shape[1:]
    grid = alive.view(frames, height // patch_size, width // patch_size)
    weight = grid.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).float()
    return pixels * (0.16 + 0.84 * weight) + 0.84 * (1 - weight) * 0.9


def alive_patches(kept: Sequence[Tensor], num_patches: int) -> list[Tensor]:
    """For each EViT layer (B, num_patches) bool: is the patch still a token of its own?"""
    masks = []
    for layers in range(1, len(kept) + 1):
        patches = token_map(kept[:layers], num_patches).patches
        # One more column takes the fused token (-1), which stands for no single patch.
        mask = torch.zeros(len(patches), num_patches + 1, dtype=torch.bool)
        mask.scatter_(1, patches.where(patches >= 0, num_patches), True)
        masks.append(mask[:, :num_patches])
    return masks


def survivors(model: Clip | TagClassifier, dataset: Dataset, *, count: int, seed: int = 0) -> list[Survivors]:
    """Randomly drawn samples, and what is left of them after each EViT layer; empty when EViT is off."""
    config = vision_config(model)
    encoder = model.vision if isinstance(model, Clip) else model.encoder
    transform = transforms.evaluate(config.image_size, config.num_frames)
    found = []
    for sample in readable(dataset, draw(seed, len(dataset), 2 * count), count):
        pixels = transform(sample, None)
        encoder.eval()
        with torch.no_grad():
            kept = encoder.encode(pixels[None]).kept
        if not kept:
            return []
        frames = pixels if pixels.ndim == 4 else pixels[:, None]
        patches = frames.shape[1] * config.patches_per_frame
        steps = [Step("input", patches, to_picture(frames))]
        for block, mask in zip(config.evit_blocks, alive_patches(kept, patches), strict=False):
            picture = to_picture(fade(frames, mask[0], config.patch_size))
            steps.append(Step(f"block {block}", int(mask[0].sum()), picture))
        found.append(Survivors(sample.caption, sample.media, steps))
    return found


def tagged_clips(
    model: TagClassifier, tags: Sequence[str], dataset: Dataset, *, count: int = 6, seed: int = 0
) -> list[TaggedClip]:
    """Randomly drawn clips with their five likeliest tags."""
    config = model.config.vision
    transform = transforms.evaluate(config.image_size, config.num_frames)
    found = []
    model.eval()
    for sample in readable(dataset, draw(seed, len(dataset), 2 * count), count):
        pixels = transform(sample, None)
        with torch.no_grad():
            top = model(pixels[None])[0].topk(min(5, len(tags))).indices.tolist()
        own = set(sample.tags)
        found.append(TaggedClip(sample.caption, to_picture(pixels), [(tags[i], tags[i] in own) for i in top]))
    return found
