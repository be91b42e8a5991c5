"""Batches as a pure function of the seed and the step, also from damaged shards."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from xray import data
from xray.data import batches
from xray.data.dataset import Dataset


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated set: 240 samples of 16 pixels."""
    return data.generated(tmp_path_factory.mktemp("shapes") / "set", 240, 3, image_size=16)


def _cut_shard(root: Path, share: float) -> None:
    path = root / "shard-00000.tar"
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def first(count: int, dataset: Dataset | list[Dataset], **options: Any) -> list[data.Batch]:
    transform = data.transforms.train(8, 2)
    made = data.loader(dataset, options.pop("batch_size", 8), transform, **{"seed": 5, **options})
    return list(islice(made, count))


def assert_equal(first: data.Batch, second: data.Batch) -> None:
    assert first.ids == second.ids
    assert first.captions == second.captions
    assert torch.equal(first.pixels, second.pixels)


def test_a_batch_is_a_function_of_seed_and_step(shapes: Path) -> None:
    dataset = Dataset(shapes)
    straight = first(40, dataset, clip_fraction=0.4)
    for start in (1, 7, 33):
        for batch, resumed in zip(
            straight[start:], first(3, dataset, clip_fraction=0.4, start_step=start), strict=False
        ):
            assert_equal(batch, resumed)
    for batch, worked in zip(straight, first(9, dataset, clip_fraction=0.4, num_workers=2), strict=False):
        assert_equal(batch, worked)
    assert first(1, dataset, seed=6)[0].ids != straight[0].ids


def test_ranks_share_the_global_batch(shapes: Path) -> None:
    dataset = Dataset(shapes)
    whole = first(6, dataset, batch_size=8)
    parts = [first(6, dataset, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert batch.ids == left.ids + right.ids
        assert torch.equal(batch.pixels, torch.cat([left.pixels, right.pixels]))


def test_an_epoch_holds_every_sample_once_and_epochs_differ(shapes: Path) -> None:
    images = Dataset(shapes, media="image")
    steps = len(images) // 8
    ids = [batch.ids for batch in first(2 * steps, images)]
    epochs = [list(chain.from_iterable(part)) for part in (ids[:steps], ids[steps:])]
    assert all(len(set(epoch)) == steps * 8 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_clips_between_do_not_make_images_come_twice(shapes: Path) -> None:
    dataset = Dataset(shapes)
    images = len(Dataset(shapes, media="image")) // 8 * 8
    made = chain.from_iterable(
        batch.ids for batch in first(2 * images // 8, dataset, clip_fraction=0.5) if batch.media == "image"
    )
    assert len(set(made)) == images


def test_weights_set_the_share_of_each_dataset(shapes: Path, tmp_path: Path) -> None:
    large, small = Dataset(shapes), Dataset(data.generated(tmp_path / "small", 40, 4, image_size=16))
    both = [large, small]
    sizes = {media: [dataset.column("media").count(media) for dataset in both] for media in ("image", "clip")}
    steps = sum(sizes["image"]) // 8

    def from_small(made: list[data.Batch], media: str) -> list[bool]:
        texts = set(zip(small.column("id"), small.column("caption"), strict=True))
        return [
            pair in texts
            for batch in made
            if batch.media == media
            for pair in zip(batch.ids, batch.captions, strict=True)
        ]

    made = first(3 * steps, both, weights=(1, 3))
    chosen = from_small(made, "image")
    assert 0.65 < sum(chosen) / len(chosen) < 0.85
    epoch = Counter(id for batch in made[:steps] for id in batch.ids)
    assert len(epoch) > 3 * sizes["image"][1] / 2  # of both, each as evenly as can be
    clips = from_small(first(60, both, weights=(1, 3), clip_fraction=1.0), "clip")
    assert 0.6 < sum(clips) / len(clips) < 0.9
    assert not any(from_small(first(9, both, weights=(5, 0)), "image"))
    for step in (2, steps, steps + 3):
        assert_equal(made[step], first(1, both, weights=(2, 6), start_step=step)[0])
        halves = [
            first(1, both, weights=(1, 3), batch_size=4, rank=rank, world_size=2, start_step=step)[0] for rank in (0, 1)
        ]
        assert made[step].ids == halves[0].ids + halves[1].ids
    mostly = first(steps, both, weights=(1, 0.001))
    counts = Counter(id for batch in mostly for id in batch.ids)
    assert max(counts.values()) <= -(-steps * 8 // sizes["image"][0]) + 1


def test_a_sample_is_augmented_anew_each_time(tmp_path: Path) -> None:
    lone = Dataset(data.generated(tmp_path / "one", 1, clip_share=0), None)
    made = first(4, lone, batch_size=2)
    seen = [pixels for batch in made for pixels in batch.pixels]
    assert not any(torch.equal(a, b) for a, b in combinations(seen, 2))


def test_batches_hold_one_kind_in_the_share_asked_for(shapes: Path) -> None:
    made = first(20, Dataset(shapes), clip_fraction=0.25)
    assert Counter(batch.media for batch in made) == {"image": 15, "clip": 5}
    for batch in made:
        assert batch.pixels.shape == ((8, 3, 2, 8, 8) if batch.media == "clip" else (8, 3, 8, 8))
        assert batch.pixels.dtype == torch.float32
        assert len(batch) == len(batch.captions) == len(batch.tags) == len(batch.labels) == 8
    assert {batch.media for batch in first(3, Dataset(shapes, media="clip"))} == {"clip"}
    both = [Dataset(shapes, media="clip"), Dataset(shapes, media="image")]
    assert {batch.media for batch in first(4, both, clip_fraction=0.5)} == {"image", "clip"}


def test_a_truncated_shard_is_survived(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batches, "_skipped", {})
    root = shutil.copytree(shapes, tmp_path / "set")
    _cut_shard(root, 0.6)
    dataset = Dataset(root, media="image")
    whole = {batch.ids[place] for batch in first(20, Dataset(shapes, media="image")) for place in range(8)}
    made = first(20, dataset)
    for batch, worked in zip(made, first(6, dataset, num_workers=2), strict=False):
        assert_equal(batch, worked)
    used = {id for batch in made for id in batch.ids}
    lost = data.skipped()
    assert lost
    assert used.isdisjoint(lost)
    assert whole & set(lost)
    assert all("truncated" in reason for reason in lost.values())
    assert all(len(set(batch.ids)) == 8 for batch in made)
    named = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    assert len(named) == len(set(named)) == min(len(lost), batches.NAMED)
    kept = [id for batch in data.sequential(dataset, 16, data.transforms.evaluate(8)) for id in batch.ids]
    assert 0 < len(kept) < len(dataset)
    assert set(kept).isdisjoint(data.skipped())
    _cut_shard(root, 0.0)
    with pytest.raises(data.DataError, match="can be read"):
        first(1, Dataset(root))


def test_sequential_gives_every_sample_once_in_order(shapes: Path) -> None:
    test = Dataset(shapes, "test")
    made = list(data.sequential(test, 7, data.transforms.evaluate(8, 2)))
    ids = [id for batch in made for id in batch.ids]
    images_first = sorted(range(len(test)), key=lambda place: (test.column("media")[place] == "clip", place))
    assert ids == [test.column("id")[place] for place in images_first]


def test_bad_arguments_of_the_loader(shapes: Path) -> None:
    dataset = Dataset(shapes)
    for options, words in (
        ({"batch_size": 0}, "batch_size, start_step and num_workers are 0, 0 and 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"clip_fraction": 1.5}, "clip_fraction is 1.5"),
    ):
        with pytest.raises(data.DataError, match=words):
            first(1, dataset, **options)
    for weights in ((1,), (0, 0), (1, -1), (1, float("inf"))):
        with pytest.raises(data.DataError, match="for 2 sources; one number from 0 up for each"):
            first(1, [dataset, dataset], weights=weights)
    with pytest.raises(data.DataError, match="hold no sample"):
        first(1, Dataset(shapes, min_tags=9))
