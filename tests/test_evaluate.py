"""Evaluation: the metrics on features made by hand, the checkpoints of every kind, and the report."""

import errno
import json
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xray import data, evaluate, models
from xray.evaluate import charts, pictures, report
from xray.evaluate.ranking import positive_ranks, recall
from xray.evaluate.retrieval import group_captions, recalls
from xray.evaluate.tags import tag_accuracy, tag_numbers, top_tags
from xray.evaluate.zero_shot import class_features, class_name, classify

# Small on purpose; the tests of this file share one generated set.
CLIP = models.ClipConfig(
    models.VisionConfig(image_size=32, patch_size=8, width=32, depth=4, heads=2, num_frames=4, keep_rate=0.5),
    models.TextConfig(vocab_size=300, context_length=16, width=32, depth=1, heads=2),
    embed_dim=16,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.generated(tmp_path_factory.mktemp("data") / "set", size=400, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer.train(["a large red circle", "a small blue star"], vocab_size=300)


@pytest.fixture(scope="module")
def clip(tokenizer: data.Tokenizer) -> models.Clip:
    torch.manual_seed(0)
    text = models.TextConfig(**{**CLIP.text.to_dict(), "vocab_size": tokenizer.vocab_size})
    return models.Clip(models.ClipConfig(CLIP.vision, text, CLIP.embed_dim))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Ranks and retrieval


def test_ranks_count_the_wrong_candidates_before_the_best_right_one() -> None:
    queries, candidates = unit(23, 6), unit(41, 6, seed=1)
    candidate_groups = torch.arange(41) % 23
    scores = queries @ candidates.T
    expected = []
    for query in range(23):
        right = candidate_groups == query
        expected.append(int((scores[query][~right] >= scores[query][right].max()).sum()))
    for tile in (1, 7, 64):
        ranks = positive_ranks(queries, candidates, torch.arange(23), candidate_groups, tile=tile)
        assert ranks.tolist() == expected


def test_ties_and_nan_never_count_as_found() -> None:
    ids = torch.arange(10)
    collapsed = torch.ones(10, 4) / 2
    assert recall(positive_ranks(collapsed, collapsed, ids, ids), 5) == 0
    lost = torch.full((10, 4), torch.nan)
    assert recall(positive_ranks(lost, unit(10, 4), ids, ids), 5) == 0
    assert recall(positive_ranks(unit(10, 4), lost, ids, ids), 5) == 0
    partly = unit(10, 10)
    partly[3] = torch.nan
    ranks = positive_ranks(unit(10, 10), partly, ids, ids)
    assert ranks[3] == 9
    assert (ranks[ids != 3] >= 1).all(), "a candidate that is not a number counts as before the right one"


def test_ranks_refuse_what_does_not_fit() -> None:
    ids = torch.arange(4)
    with pytest.raises(evaluate.EvaluationError, match="same D, got"):
        positive_ranks(unit(4, 3), unit(4, 5), ids, ids)
    with pytest.raises(evaluate.EvaluationError, match="one number per row"):
        positive_ranks(unit(4, 3), unit(4, 3), ids, ids[:2])
    with pytest.raises(evaluate.EvaluationError, match="query 3 has no right candidate"):
        positive_ranks(unit(4, 3), unit(4, 3), ids, torch.tensor([0, 1, 2, 2]))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_retrieval_never_holds_all_similarities() -> None:
    features = unit(600, 8)
    with LargestTensor() as mode:
        result = recalls(features, features, torch.arange(600), tile=48)
    assert result["text_to_image"]["r@1"] == 1
    assert mode.largest <= 600 * 8


def test_random_features_give_chance_and_perfect_ones_everything() -> None:
    pairs, repeats = 150, 12
    found: Counter[tuple[str, int]] = Counter()
    for seed in range(repeats):
        images, texts = unit(pairs, 16, seed=2 * seed), unit(pairs, 16, seed=2 * seed + 1)
        result = recalls(images, texts, torch.arange(pairs))
        for way in ("text_to_image", "image_to_text"):
            for k in (1, 5, 10):
                found[way, k] += result[way][f"r@{k}"] / repeats
    assert result["candidates"] == pairs
    assert [result[f"chance_r@{k}"] for k in (1, 5, 10)] == [1 / 150, 5 / 150, 10 / 150]
    for (_, k), value in found.items():
        chance = k / pairs
        spread = (chance * (1 - chance) / (pairs * repeats)) ** 0.5
        assert abs(value - chance) < 4.5 * spread
    perfect = recalls(images, images, torch.arange(pairs))
    assert perfect["text_to_image"] == perfect["image_to_text"] == {
        "r@1": 1.0, "r@5": 1.0, "r@10": 1.0, "median_rank": 1,
    }  # fmt: skip


def test_identical_captions_are_one_group() -> None:
    captions = ["Red heart", "blue star", "red  heart", "green tree", "RED HEART "]
    distinct, groups = group_captions(captions)
    assert distinct == ["Red heart", "blue star", "green tree"]
    assert groups.tolist() == [0, 1, 0, 2, 0]
    texts = torch.eye(3)
    images = torch.eye(3)[groups]
    result = recalls(images, texts, groups)
    assert (result["candidates"], result["images"]) == (3, 5)
    assert result["text_to_image"]["r@1"] == result["image_to_text"]["r@1"] == 1
    # One of the three hearts looks like a star, the others still answer.
    images[0] = torch.eye(3)[1]
    result = recalls(images, texts, groups)
    assert result["image_to_text"]["r@1"] == pytest.approx(4 / 5)
    assert result["text_to_image"]["r@1"] == pytest.approx(2 / 3), "the star ties with the heart that looks like it"


def test_chance_is_honest_when_captions_repeat() -> None:
    """120 images share 40 captions, ten of nine images each: luck stays at k / U."""
    groups = torch.cat([torch.arange(40), torch.arange(10).repeat(8)])
    repeats = 40
    both = {"text_to_image": 0.0, "image_to_text": 0.0}
    for seed in range(repeats):
        result = recalls(unit(120, 32, seed=2 * seed), unit(40, 32, seed=2 * seed + 1), groups)
        for way in both:
            both[way] += result[way]["r@5"] / repeats
    assert result["chance_r@5"] == 5 / 40
    assert both["image_to_text"] == pytest.approx(5 / 40, abs=0.02)
    assert 0.8 * 5 / 40 < both["text_to_image"] < 5 / 40 + 0.02


# Zero-shot classification


def test_classify_beside_its_baselines() -> None:
    classes = unit(10, 8)
    targets = torch.cat([torch.zeros(50, dtype=torch.int64), torch.arange(10).repeat(5)])
    perfect = classify(classes[targets], classes, targets)
    assert perfect["top1"] == perfect["top5"] == perfect["mean_per_class"] == 1
    assert (perfect["chance"], perfect["chance_top5"], perfect["classes"]) == (0.1, 0.5, 10)
    assert perfect["most_frequent"] == 0.55
    constant = classify(classes[torch.zeros_like(targets)], classes, targets)
    assert constant["top1"] == constant["most_frequent"], "always answering class 0 is the best constant answer"
    assert constant["mean_per_class"] == pytest.approx(constant["chance"])
    results = [classify(unit(100, 8, seed=s + 1), unit(10, 8, seed=1000 + s), targets) for s in range(60)]
    assert sum(r["mean_per_class"] for r in results) / 60 == pytest.approx(0.1, abs=0.015)
    assert sum(r["top5"] for r in results) / 60 == pytest.approx(0.5, abs=0.03)


def test_class_features_average_the_templates(clip: models.Clip, tokenizer: data.Tokenizer) -> None:
    assert class_name("food-and_drink  &more") == "food and drink and more"
    labels = ["big-circle", "star"]
    both = class_features(clip, tokenizer, labels, ("{}", "a small {}"))
    expected = torch.stack(
        [
            evaluate.embed_texts(clip, tokenizer, [name, f"a small {name}"]).mean(dim=0)
            for name in ("big circle", "star")
        ]
    )
    torch.testing.assert_close(both, F.normalize(expected, dim=-1))
    with pytest.raises(evaluate.EvaluationError, match="templates must be"):
        class_features(clip, tokenizer, labels, ("no place",))


def test_zero_shot_leaves_rare_classes_out(clip: models.Clip, tokenizer: data.Tokenizer, root: Path) -> None:
    test = data.Dataset(root, "test", media="image")
    counts = Counter(test.column("label"))
    enough = sorted(counts.values())[len(counts) // 2]
    result = evaluate.zero_shot(clip, tokenizer, test, min_per_class=enough, progress=False)
    kept = {name: count for name, count in counts.items() if count >= enough}
    assert 2 <= len(kept) < len(counts)
    assert {entry["name"]: entry["images"] for entry in result["per_class"]} == kept
    assert result["images"] == sum(kept.values())
    assert result["chance"] == 1 / len(kept)
    with pytest.raises(evaluate.EvaluationError, match="at least 2 classes with 9999"):
        evaluate.zero_shot(clip, tokenizer, test, min_per_class=9999, progress=False)


# Tags


def test_tags_beside_their_baselines() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = [f"tag {i}" for i in range(20)]
    own = [["tag 0", *(vocabulary[i] for i in torch.randperm(20, generator=generator)[:3])] for _ in range(2000)]
    truth = tag_numbers([*own, ["elsewhere"], []], vocabulary)
    mean_tags = sum(len(tags) for tags in truth) / 2000
    result = tag_accuracy(top_tags(torch.randn(2002, 20, generator=generator)), truth, 20)
    assert (result["clips"], result["without_tags"], result["classes"]) == (2000, 2, 20)
    assert result["chance"] == pytest.approx(mean_tags / 20)
    assert result["top1"] == pytest.approx(result["chance"], abs=0.03)
    assert result["top5"] == pytest.approx(result["chance_top5"], abs=0.03)
    assert result["distinct_predictions"] == 20
    constant = torch.zeros(2002, 20)
    constant[:, 0] = 1
    assert tag_accuracy(top_tags(constant), truth, 20)["top1"] == result["most_frequent"] == 1
    perfect = torch.zeros(2002, 20)
    for row, tags in enumerate(truth):
        perfect[row, list(tags)] = 1
    assert tag_accuracy(top_tags(perfect), truth, 20)["top1"] == 1


def test_tags_without_an_answer() -> None:
    lost = top_tags(torch.full((3, 8), torch.nan))
    assert tag_accuracy(lost, [{0}, {1}, {2, 3}], 8)["top5"] == 0
    assert top_tags(torch.tensor([[torch.nan, 1.0, 3.0]])).tolist() == [[2, 1, -1]]
    with pytest.raises(evaluate.EvaluationError, match="0 of 2 samples"):
        tag_accuracy(torch.zeros(2, 1, dtype=torch.int64), [set(), set()], 4)
    with pytest.raises(evaluate.EvaluationError, match="one row per sample"):
        tag_accuracy(torch.zeros(2, 1, dtype=torch.int64), [{1}], 4)


# Features of a dataset


def test_embedding_keeps_the_order_of_images_and_clips(clip: models.Clip, root: Path) -> None:
    test = data.Dataset(root, "test")
    embedded = evaluate.embed_dataset(clip.train(), test, batch_size=7, progress=False)
    assert clip.training, "the model comes back in the mode it was in"
    assert embedded.positions == list(range(len(test)))
    assert embedded.ids == test.column("id")
    assert embedded.captions == test.column("caption")
    assert not embedded.features.requires_grad
    transform = data.transforms.evaluate(32, 4)
    for media in ("image", "clip"):
        row = test.column("media").index(media)
        alone = clip.encode_image(transform(test[row], None)[None])[0]
        torch.testing.assert_close(embedded.features[row], alone.detach(), atol=1e-5, rtol=1e-4)
    dense = evaluate.embed_dataset(clip, test, keep_rate=1.0, progress=False)
    assert not torch.allclose(dense.features, embedded.features, atol=1e-3)


def test_unreadable_samples_are_named_and_left_out(clip: models.Clip, tmp_path: Path) -> None:
    folder = data.generated(tmp_path / "set", size=40, seed=1)
    test = data.Dataset(folder, None, media="image")
    shard = folder / test.column("shard")[0]
    cut = test.column("offset")[len(test) // 2]
    shard.write_bytes(shard.read_bytes()[:cut])
    test = data.Dataset(folder, None, media="image")
    embedded = evaluate.embed_dataset(clip, test, progress=False)
    assert len(embedded) == len(test) // 2
    assert len(embedded.skipped) == len(test) - len(test) // 2
    assert embedded.skipped[0][0] == test.column("id")[len(test) // 2]
    assert "truncated" in embedded.skipped[0][1]
    shard.write_bytes(b"")
    with pytest.raises(evaluate.EvaluationError, match=f"{len(test)} of them unreadable"):
        evaluate.embed_dataset(clip, data.Dataset(folder, None, media="image"), progress=False)


def test_embedding_refuses_other_models(root: Path, clip: models.Clip) -> None:
    with pytest.raises(TypeError, match="must have an image encoder, got Linear"):
        evaluate.embed_dataset(torch.nn.Linear(2, 2), data.Dataset(root, "test"), progress=False)
    with pytest.raises(evaluate.EvaluationError, match="batch_size must be at least 1, got 0"):
        evaluate.embed_dataset(clip, data.Dataset(root, "test"), batch_size=0, progress=False)


# Checkpoints


def test_checkpoints_of_every_kind(root: Path, clip: models.Clip, tokenizer: data.Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    models.save(clip, run / "model.safetensors", tokenizer=tokenizer.to_json())
    result = evaluate.evaluate_checkpoint(run, root, min_per_class=2, progress=False)
    assert result["kind"] == "clip"
    images = data.Dataset(root, "test", media="image")
    assert result["retrieval"]["images"] == result["samples"] == len(images)
    frequent = [label for label, count in Counter(images.column("label")).items() if count >= 2]
    assert result["zero_shot"]["classes"] == len(frequent) > 2
    rare = evaluate.evaluate_checkpoint(run, root, min_per_class=9999, progress=False)
    assert "zero_shot" not in rare
    assert "9999" in rare["zero_shot_missing"]

    vocabulary = sorted({tag for tags in images.column("tags") for tag in tags})
    tags = models.TagClassifier(models.TagConfig(CLIP.vision, len(vocabulary)))
    models.save(tags, tmp_path / "tags.safetensors", tags=json.dumps(vocabulary))
    result = evaluate.evaluate_checkpoint(tmp_path / "tags.safetensors", root, progress=False)
    assert result["clip_tags"]["clips"] == len(data.Dataset(root, "test", media="clip"))
    assert result["clip_tags"]["classes"] == len(vocabulary)
    with pytest.raises(evaluate.EvaluationError, match=f"{len(vocabulary)} outputs, got 2 names"):
        evaluate.clip_tags(tags, ["a", "b"], images)

    mae = models.MaskedAutoencoder(models.MaeConfig(CLIP.vision, 16, 1, 2))
    models.save(mae, tmp_path / "mae.safetensors")
    result = evaluate.evaluate_checkpoint(tmp_path / "mae.safetensors", root, progress=False)
    again = evaluate.evaluate_checkpoint(tmp_path / "mae.safetensors", root, progress=False)
    assert result == again, "masks are fixed"
    assert result["reconstruction"]["images"] == len(images)
    assert 0.5 < result["reconstruction"]["loss"] < 4


def test_checkpoints_that_cannot_be_evaluated(root: Path, clip: models.Clip, tmp_path: Path) -> None:
    models.save(clip, tmp_path / "clip.safetensors")
    with pytest.raises(evaluate.EvaluationError, match="saved without its tokenizer"):
        evaluate.evaluate_checkpoint(tmp_path / "clip.safetensors", root, progress=False)
    models.save(clip.vision, tmp_path / "vision.safetensors")
    with pytest.raises(evaluate.EvaluationError, match="holds a 'vision' model"):
        evaluate.evaluate_checkpoint(tmp_path / "vision.safetensors", root, progress=False)
    with pytest.raises(models.CheckpointError, match="does not exist"):
        evaluate.evaluate_checkpoint(tmp_path / "none.safetensors", root, progress=False)
    with pytest.raises(data.DataError, match="no folder"):
        evaluate.evaluate_checkpoint(tmp_path / "clip.safetensors", tmp_path / "none", progress=False)
    with pytest.raises(evaluate.EvaluationError, match="device is 'toaster', which cannot be used here"):
        evaluate.evaluate_checkpoint(tmp_path / "clip.safetensors", root, device="toaster", progress=False)
    stills = data.generated(tmp_path / "stills", size=40, clip_share=0)
    with pytest.raises(evaluate.EvaluationError, match="holds no clip in its test split"):
        evaluate.evaluate_checkpoint(tmp_path / "clip.safetensors", stills, media="clip", progress=False)


# Which patches survive


def test_patches_are_traced_through_the_layers() -> None:
    """The chain of indices against tokens that carry their own patch number through a real reorganisation."""
    generator = torch.Generator().manual_seed(3)
    patches = 16
    numbers = torch.arange(1.0, patches + 1).expand(3, patches)
    kept, expected = [], []
    for _ in range(3):
        scores = torch.rand(numbers.shape, generator=generator)
        scores[numbers == 0] = 2.0  # the fused token wins every time
        indices = scores.topk(numbers.shape[1] // 2, dim=1).indices
        kept.append(indices)
        numbers = torch.cat([numbers.gather(1, indices), torch.zeros(3, 1)], dim=1)
        expected.append([{int(n) - 1 for n in row if n} for row in numbers.tolist()])
    masks = pictures.alive_patches(kept, patches)
    assert [[set(row.nonzero()[:, 0].tolist()) for row in mask] for mask in masks] == expected
    assert masks[0].shape == (3, patches)
    assert masks[2].sum() < sum(indices.shape[1] for indices in kept[2:]) * 3, "a kept fused token is no patch"


def test_survivors_of_a_clip_shrink_layer_by_layer(clip: models.Clip, root: Path) -> None:
    (item,) = pictures.survivors(clip, data.Dataset(root, "test", media="clip"), count=1)
    assert item.kind == "clip"
    assert [step.name for step in item.steps] == ["input", "block 1", "block 2", "block 3"]
    counts = [step.patches for step in item.steps]
    assert counts[:2] == [64, 32]
    assert counts == sorted(counts, reverse=True)
    assert item.steps[0].picture.size == (4 * 32, 32)
    dense = models.Clip(
        models.ClipConfig(models.VisionConfig(**{**CLIP.vision.to_dict(), "keep_rate": 1.0}), CLIP.text, CLIP.embed_dim)
    )
    assert pictures.survivors(dense, data.Dataset(root, "test", media="clip"), count=1) == []


def test_fading_touches_only_the_patches_that_are_gone() -> None:
    pixels = torch.full((3, 2, 8, 8), -1.0)
    alive = torch.ones(8, dtype=torch.bool)
    alive[5] = False  # second frame, top right
    faded = pictures.fade(pixels, alive, patch_size=4)
    changed = (faded != pixels).all(dim=0)
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[1, :4, 4:] = True
    assert torch.equal(changed, expected)
    assert faded.abs().max() <= 1


# Pictures


def test_retrieval_pictures_frame_the_right_ones(
    root: Path, clip: models.Clip, tokenizer: data.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = data.Dataset(root, "test", media="image")
    embedded = evaluate.embed_dataset(clip, test, progress=False)
    # Every caption's feature is its own image's: the right one must come first, and framed.
    own = {" ".join(c.casefold().split()): f for c, f in zip(embedded.captions, embedded.features, strict=True)}
    monkeypatch.setattr(
        pictures,
        "embed_texts",
        lambda model, tokenizer, texts: torch.stack([own[t.casefold()] for t in texts]),
    )
    found = pictures.retrievals(clip, tokenizer, test, embedded, count=4, seed=3)
    assert len(found) == 4
    for item in found:
        assert item.query in embedded.captions
        assert item.rank == 1
        assert [result.right for result in item.results] == [True, False, False, False, False]
        assert item.results[0].caption == item.query
    assert [item.query for item in pictures.retrievals(clip, tokenizer, test, embedded, count=4, seed=3)] == [
        item.query for item in found
    ]


def test_reconstructions_show_the_visible_patches_as_they_were(root: Path) -> None:
    mae = models.MaskedAutoencoder(models.MaeConfig(CLIP.vision, 16, 1, 2))
    triples = pictures.reconstructions(mae, data.Dataset(root, "test", media="image"), count=3)
    assert len(triples) == 3
    for original, masked, filled in triples:
        before, hidden, after = (data_of(picture) for picture in (original, masked, filled))
        same = (before == hidden).all(dim=-1)
        assert same.float().mean() == pytest.approx(0.25, abs=0.08)
        assert torch.equal(before[same], after[same])
        assert not torch.equal(before, after)


def data_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


# Charts and the report


def test_charts_survive_bad_numbers() -> None:
    nan = float("nan")
    chart = charts.line_chart([("loss <b>", [1, 2, 3, 4], [3.0, nan, 2.0, 1.0]), ("b", [1, 2], [2.0, 1.0])])
    assert "nan" not in chart
    assert "loss &lt;b&gt;" in chart
    assert chart.count("<polyline") == 4
    assert "Nothing" in charts.line_chart([("loss", [1, 2], [nan, nan])])
    assert charts.line_chart([("loss", [1], [2.0])]).count("<polyline") == 2
    assert charts.smooth([1.0, 1.0, nan, 1.0]) == pytest.approx([1.0] * 4)
    assert charts.ticks(0, 600) == [0, 200, 400, 600]
    assert charts.ticks(0.93, 1.21) == [1.0, 1.1, 1.2]


class Page(HTMLParser):
    """Collects the elements and the addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on")]


EVIL = "<script>alert('caption')</script> \"quoted\" & co"


def example_metrics() -> dict[str, Any]:
    recall = {"r@1": 0.1, "r@5": 0.3, "r@10": 0.4, "median_rank": 21}
    retrieval = {
        "text_to_image": recall, "image_to_text": recall, "candidates": 480, "images": 500,
        "chance_r@1": 1 / 480, "chance_r@5": 5 / 480, "chance_r@10": 10 / 480,
    }  # fmt: skip
    zero_shot = {
        "top1": 0.4, "top5": 0.8, "mean_per_class": 0.35, "classes": 12, "images": 500, "chance": 1 / 12,
        "chance_top5": 5 / 12, "most_frequent": 0.2,
        "per_class": [{"name": EVIL, "images": 9, "accuracy": 0.5}],
    }  # fmt: skip
    stage = {"steps": 10, "seconds": 61.0, "final_loss": 0.5, "images_per_s": 200.0}
    return {
        "data": {
            "train": 4000, "test": 500, "dropped": 7, "train_clips": 100, "test_clips": 20,
            "dropped_by_reason": {EVIL: 7},
            "sources": [
                {"name": EVIL, "used": True, "train": 4000, "test": 500, "reason": ""},
                {"name": "emojibase", "used": False, "train": 0, "test": 0, "reason": EVIL},
            ],
        },
        "stages": [{"name": name, **stage} for name in ("mae", "tags", "clip")],
        "retrieval": retrieval, "zero_shot": zero_shot,
        "clip_tags": {
            "top1": 0.3, "top5": 0.6, "classes": 300, "clips": 20, "chance": 0.01, "most_frequent": 0.1,
        },
        "ablation": {"clip_only": {"retrieval": retrieval, "zero_shot": zero_shot, **stage}},
        "seconds": {"data": 30.0, "total": 300.0},
        "hardware": {"cpu": "A processor", "threads": 2}, "versions": {"python": "3.11"},
        "finished": "2026-01-01", "seed": 0, "command": EVIL,
    }  # fmt: skip


def example_pictures() -> pictures.Pictures:
    image = Image.new("RGB", (32, 32), "red")
    step = pictures.Step("input", 16, image)
    return pictures.Pictures(
        retrievals=[pictures.Retrieval(EVIL, 3, [pictures.Result(image, EVIL + "x" * 10_000, True)])],
        reconstructions=[(image, image, image)],
        survivors=[pictures.Survivors(EVIL, "image", [step]), pictures.Survivors(EVIL, "clip", [step])],
        clips=[pictures.TaggedClip(EVIL, image, [(EVIL, True)])],
    )


def test_report_escapes_captions_and_fetches_nothing(tmp_path: Path) -> None:
    curves: report.Curves = {
        "mae": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}],
        "clip": [{"step": 1, "loss": 2.0}],
    }
    path = report.write_report(tmp_path / "report.html", example_metrics(), curves, example_pictures())
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.elements["script"] == 0
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    assert page.elements["img"] == 1 + 3 + 2 + 1
    assert all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "x" * 200 not in html, "a caption of 10,000 characters is shortened"
    assert "28.8\u00d7" in html, "recall of 0.3 over a chance of 5 / 480"
    assert html.count("<svg") == 2, "stages 1 and 3 have curves, stage 2 recorded nothing"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}


def test_report_says_who_wins(tmp_path: Path) -> None:
    metrics = example_metrics()
    alone = json.loads(json.dumps(metrics["ablation"]["clip_only"]))
    alone["retrieval"]["text_to_image"]["r@1"] = 0.9
    alone["zero_shot"]["top1"] = 0.0
    metrics["ablation"]["clip_only"] = alone
    html = report.write_report(tmp_path / "a.html", metrics, {}, pictures.Pictures()).read_text()
    assert "ahead in 1 of 8 measures and behind in 1" in html
    assert "Text to image</h2>" not in html, "sections without pictures are left out"


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(evaluate.EvaluationError, match=r"report.html cannot be written: \w"):
        report.write_report(tmp_path / "file" / "report.html", example_metrics(), {}, pictures.Pictures())


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    report.write_text(path, "old")

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text.encode()[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(evaluate.EvaluationError, match=r"metrics.json cannot be written: No space"):
        report.write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_durations_and_long_texts() -> None:
    assert [report.duration(s) for s in (0.42, 38.4, 59.7, 425.0)] == [
        "0.4 s",
        "38 s",
        "1 min 00 s",
        "7 min 05 s",
    ]
    assert report.shorten("a  b\n c") == "a b c"
    assert report.shorten("x" * 300) == "x" * 89 + "…"
    assert report.shorten("x" * 90) == "x" * 90
