"""Where a run's samples come from: packed datasets, read at random, or streams of shards; to the loop both are one."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xray import data
from xray.train import schedule
from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe

MOST_PIXELS = 512  # on the longer side of what a stream decodes, unless a crop needs more
MOST_FRAMES = 16  # decoded of a clip of a stream, of which `num_frames` are drawn
MOST_TEXTS = 1_000_000  # read of a stream, to learn its tags or a tokenizer


class Source(Protocol):
    """What the loop needs of its data."""

    def texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Caption and tags of the training samples, as many as it takes to learn tags or a tokenizer."""

    def batches(self, start_step: int, state: Mapping[int, bytes]) -> Iterator[data.Batch]:
        """This process's part of the batches from a step on; `state` is what all processes' batches before carried."""

    def __str__(self) -> str:
        """How much there is, in words."""


def open_source(recipe: Recipe, out: Path, place: World) -> Source:
    """The training split of what `recipe.data` names; the generated set is made in `out` on the first call.

    Raises:
        DataError: a folder or its shards are missing or damaged, or there are fewer shards than readers.
        TrainError: a key that only the other kind of source has.
    """
    if recipe.stream:
        return Streamed(recipe, place)
    if recipe.readers:
        raise TrainError(f"readers is {recipe.readers} and must be 0 without stream=true, for which they are")
    return Indexed(recipe, out, place)


def num_readers(recipe: Recipe, size: int) -> int:
    """Readers of a new run's stream over `size` processes: the recipe's, or one for each worker; 0 without a stream.

    A run keeps the number that it began with, so it belongs into the recipe that its checkpoints hold.
    """
    return (recipe.readers or size * max(1, recipe.num_workers)) if recipe.stream else recipe.readers


def train_transform(recipe: Recipe) -> data.transforms.Transform | data.transforms.Scheduled:
    """The training transform, of the image size that each step has."""
    stages: list[tuple[int, data.transforms.Transform]] = []
    for size, shapes in itertools.groupby(schedule.shapes(recipe), key=lambda shape: shape.image_size):
        stages.append((next(shapes).first_step, data.transforms.train(size, recipe.num_frames)))
    return stages[0][1] if len(stages) == 1 else data.transforms.Scheduled(tuple(stages))


class Indexed:
    """Packed datasets with an index: each epoch is a permutation of their samples, cut into batches."""

    def __init__(self, recipe: Recipe, out: Path, place: World) -> None:
        self.recipe, self.place = recipe, place
        if recipe.data == "generated":
            roots = [_generated(recipe, out, place)]
        else:
            roots = [Path(source) for source in data.parse_sources(recipe.data)]
        wanted = _wanted(recipe)
        self.datasets = [data.Dataset(root, "train", **wanted) for root in roots]

    def texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        for dataset in self.datasets:
            yield from zip(dataset.column("caption"), dataset.column("tags"), strict=True)

    def batches(self, start_step: int, state: Mapping[int, bytes]) -> Iterator[data.Batch]:
        settings = _loader_settings(self.recipe, self.place, start_step)
        return data.loader(self.datasets, weights=self.recipe.data_weights or None, seed=self.recipe.seed, **settings)

    def __str__(self) -> str:
        media = Counter(kind for dataset in self.datasets for kind in dataset.column("media"))
        return f"{media['image']} images and {media['clip']} clips"


class Streamed:
    """Tar shards that are read one after the other, by a number of readers that a run keeps."""

    def __init__(self, recipe: Recipe, place: World) -> None:
        self.recipe, self.place = recipe, place
        self.stream = data.Stream(
            recipe.data,
            weights=recipe.data_weights or None,
            seed=recipe.seed,
            readers=num_readers(recipe, place.size),
            shuffle_buffer=recipe.shuffle_buffer,
            read_timeout=recipe.read_timeout,
            max_side=max(MOST_PIXELS, 2 * recipe.image_size),
            max_frames=max(MOST_FRAMES, recipe.num_frames),
            **_wanted(recipe),
        )

    def texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        yield from self.stream.texts(MOST_TEXTS)

    def batches(self, start_step: int, state: Mapping[int, bytes]) -> Iterator[data.Batch]:
        return data.stream_loader(self.stream, state=state, **_loader_settings(self.recipe, self.place, start_step))

    def __str__(self) -> str:
        shards, readers = self.stream.num_shards, self.stream.readers
        return f"{shards} shard{'s' * (shards > 1)} by {readers} reader{'s' * (readers > 1)}"


def _wanted(recipe: Recipe) -> dict[str, Any]:
    """Which samples a task can learn from: pictures, those with tags, those with a caption."""
    return {
        "media": "image" if recipe.task == "mae" else None,
        "min_tags": 1 if recipe.task == "tags" else 0,
        "captioned": recipe.task == "clip",
    }


def _loader_settings(recipe: Recipe, place: World, start_step: int) -> dict[str, Any]:
    """What both kinds of loader are told."""
    return {
        "batch_size": recipe.batch_size // place.size,
        "transform": train_transform(recipe),
        "start_step": start_step,
        "num_workers": recipe.num_workers,
        "rank": place.rank,
        "world_size": place.size,
        "clip_fraction": recipe.clip_fraction,
    }


def _generated(recipe: Recipe, out: Path, place: World) -> Path:
    frames = max(2, recipe.num_frames)
    root = out / f"generated-{recipe.data_size}x{recipe.image_size}x{frames}"

    def generate() -> None:
        if not (root / "index.parquet").is_file():
            data.generated(root, recipe.data_size, image_size=recipe.image_size, num_frames=frames)

    place.first_does(generate)
    return root
