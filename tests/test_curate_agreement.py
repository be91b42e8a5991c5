"""Agreement of caption and picture: the score, its quantile, and the step with a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curate_frames import context_for, daft, frame_of, reasons_of, rows_of

from xray import data, models, train
from xray.curate import agreement
from xray.curate.settings import Settings
from xray.data.errors import DataError
from xray.data.shapes import samples
from xray.data.shards import encode
from xray.train.recipes import clip_tiny

PAIRS = 60
SWAPPED = 6


@pytest.fixture(scope="module")
def shapes() -> list[dict[str, Any]]:
    """Rows of coloured shapes, images and clips, each with the right caption."""
    return [
        {
            "media": entry.media,
            "caption": entry.caption,
            "tags": entry.tags,
            "frames": len(frames),
            "data": encode(frames, entry.media)[0],
        }
        for entry, frames in samples(PAIRS, seed=3, image_size=32)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the captions of these shapes by heart."""
    root = tmp_path_factory.mktemp("agreement")
    recipe = replace(
        clip_tiny(),
        data=str(data.generated(root / "data", PAIRS, seed=3, image_size=32)),
        steps=90,
        batch_size=32,
        clip_fraction=0.3,
        keep_rate_warmup=0,
        peak_tflops=1.0,
        checkpoint_every=0,
        tensorboard=False,
        progress=False,
        out=str(root / "run"),
    )
    train.run(recipe)
    return root / "run"


@pytest.fixture
def untrained(tmp_path: Path) -> Callable[..., Path]:
    """Makes the file of a model with random weights; `extra` are strings of its header."""

    def make(name: str = "untrained", **extra: str) -> Path:
        vision = replace(models.SIZES["tiny"], image_size=32, num_frames=4)
        text = models.TextConfig(vocab_size=300, context_length=40, width=16, depth=1, heads=2)
        model = models.Clip(models.ClipConfig(vision=vision, text=text, embed_dim=16))
        models.save(model, tmp_path / f"{name}.st", state_dict=None, **extra)
        return tmp_path / f"{name}.st"

    return make


def tokenizer() -> str:
    return data.Tokenizer.train(["a red circle on a blue background", "a star"], 300).to_json()


def agree(
    rows: list[dict[str, Any]], folder: Path, **settings: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What the step makes of rows whose pixels are in the table of `decode`, by id, and its facts."""
    frame = frame_of(rows)
    frame.write_parquet(str(folder / "decode" / "rows"))
    context = replace(context_for(folder / "agreement", **settings), earlier={"decode": folder / "decode"})
    heavy = [name for name in ("data",) if name in frame.column_names]
    return rows_of(agreement.agree(frame.exclude(*heavy), context)), context.facts


def test_swapped_captions_are_found(shapes: list[dict[str, Any]], run: Path, tmp_path: Path) -> None:
    captions = [row["caption"] for row in shapes]
    swapped = range(0, PAIRS, PAIRS // SWAPPED)
    dirty = [{**row} for row in shapes]
    for place, other in zip(swapped, [*swapped[1:], swapped[0]], strict=True):
        dirty[place]["caption"] = captions[other]
    rows, facts = agree(dirty, tmp_path, checkpoint=str(run), agreement=SWAPPED / PAIRS)
    dropped = {id for id, row in rows.items() if row["reason"]}
    assert dropped == {f"{place:03d}" for place in swapped}
    assert {rows[id]["reason"] for id in dropped} == {agreement.REASON}
    kept = [row["agreement"] for row in rows.values() if not row["reason"]]
    assert all(rows[id]["agreement"] < facts["threshold"] <= min(kept) + 1e-6 for id in dropped)
    assert np.mean(kept) > 1.5 > 0.5 > np.mean([rows[id]["agreement"] for id in dropped])


def test_scores_do_not_depend_on_what_comes_with_them(shapes: list[dict[str, Any]], run: Path, tmp_path: Path) -> None:
    one, facts = agree(shapes, tmp_path / "one", checkpoint=str(run / "model.safetensors"))
    named = [{**row, "id": f"{number:03d}"} for number, row in enumerate(shapes)]
    turned, facts_of_turned = agree(named[::-1], tmp_path / "turned", checkpoint=str(run))
    assert one == turned
    assert facts == facts_of_turned
    assert facts["scored"] == PAIRS == sum(count for _, count in facts["histogram"])
    assert 0 < sum(row["reason"] is not None for row in one.values()) <= 0.1 * PAIRS


def test_samples_without_caption_or_media_stay(shapes: list[dict[str, Any]], run: Path, tmp_path: Path) -> None:
    bare = [{**shapes[0], "caption": ""}, {**shapes[1], "data": None, "frames": None, "media": ""}]
    rows, facts = agree([*bare, *shapes[2:]], tmp_path, checkpoint=str(run), agreement=1.0)
    assert len(rows) == PAIRS
    assert facts["scored"] == PAIRS - 2
    for id, row in rows.items():
        assert (row["agreement"] is None) == (row["reason"] is None) == (id in ("000", "001"))


def test_tags_are_added_to_the_caption_as_in_training(
    shapes: list[dict[str, Any]], untrained: Callable[..., Path], tmp_path: Path
) -> None:
    plain = untrained("plain", tokenizer=tokenizer(), recipe=json.dumps({"caption_tags": 0}))
    model, header = models.load(plain, kind="clip")
    models.save(model, tmp_path / "tagged.st", tokenizer=header["tokenizer"], recipe=json.dumps({"caption_tags": 2}))
    rows = [{**row, "caption": row["tags"][0], "tags": ["gift", row["tags"][1]]} for row in shapes[:20]]
    said = [{**row, "caption": ", ".join([row["caption"], *row["tags"]])} for row in rows]
    by_tags, _ = agree(rows, tmp_path / "a", checkpoint=str(tmp_path / "tagged.st"))
    by_words, _ = agree(said, tmp_path / "b", checkpoint=str(plain))
    neither, _ = agree(rows, tmp_path / "c", checkpoint=str(plain))
    scores = [[row["agreement"] for row in found.values()] for found in (by_tags, by_words, neither)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("rows", [[], [{"caption": "no picture"}], [{"caption": "a star", "data": None}]])
def test_nothing_to_score(rows: list[dict[str, Any]], untrained: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"frames": None, "data": None, **row} for row in rows]
    frame = rows or [{"frames": 1, "data": b"", "caption": ""}]
    found, facts = agree(frame, tmp_path, checkpoint=str(untrained(tokenizer=tokenizer())))
    assert facts == {"threshold": None, "scored": 0, "histogram": []}
    assert all(row["reason"] is None and row["agreement"] is None for row in found.values())


def test_without_a_checkpoint_all_stay(tmp_path: Path) -> None:
    frame = agreement.agree(frame_of([{"caption": "a"}, {"caption": "b"}]), context_for(tmp_path, agreement=1.0))
    assert reasons_of(frame) == {"000": None, "001": None}
    assert "agreement" in frame.column_names


def test_a_checkpoint_that_cannot_be_used_is_named(untrained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*cannot be read"):
        agreement.STEP.inputs("", Settings(checkpoint=str(tmp_path / "nowhere")))  # type: ignore[misc]
    with pytest.raises(DataError, match="without its tokenizer"):
        agree([{"data": None, "frames": 1}], tmp_path, checkpoint=str(untrained()))
    text = models.TextTransformer(models.TextConfig(vocab_size=300, context_length=8, width=16, depth=1, heads=2))
    models.save(text, tmp_path / "text.st")
    with pytest.raises(DataError, match="'text' model"):
        agree([{"data": None, "frames": 1}], tmp_path / "b", checkpoint=str(tmp_path / "text.st"))
    (tmp_path / "noise.st").write_bytes(b"noise")
    with pytest.raises(DataError, match="noise"):
        agree([{"data": None, "frames": 1}], tmp_path / "c", checkpoint=str(tmp_path / "noise.st"))


def test_another_model_in_the_same_place_is_another_input(untrained: Callable[..., Path]) -> None:
    assert agreement.STEP.inputs is not None
    settings = Settings(checkpoint=str(untrained(tokenizer=tokenizer())))
    first = agreement.STEP.inputs("", settings)
    assert agreement.STEP.inputs("", settings) == first
    untrained(tokenizer=tokenizer())
    assert agreement.STEP.inputs("", settings) != first
    assert agreement.STEP.inputs("", Settings()) is None


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_scores_count_deviations_from_chance() -> None:
    """Against the definition: the cosine with every caption and every picture, its mean and deviation."""
    rng = np.random.default_rng(0)
    images, texts = unit(rng.normal(size=(50, 8)) + 1), unit(rng.normal(size=(50, 8)) + 0.5)
    sides = np.stack([images, texts])
    mean = sides.mean(axis=1)
    covariance = np.stack([np.cov(side.T, bias=True) for side in sides])
    cosines = images @ texts.T
    by_row = (np.diag(cosines) - cosines.mean(axis=1)) / cosines.std(axis=1)
    by_column = (np.diag(cosines) - cosines.mean(axis=0)) / cosines.std(axis=0)
    expected = (by_row + by_column) / 2
    found = agreement.scores(np.concatenate([images, texts], axis=1), mean, covariance) / agreement.PARTS
    np.testing.assert_allclose(found, expected, atol=0.51 / agreement.PARTS)


def test_chance_is_that_of_the_same_sample_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    ids = [f"{number:03d}" for number in range(40)]
    frame = daft.from_pydict({"id": ids, "pair": pairs.tolist()})
    turned = daft.from_pydict({"id": ids[::-1], "pair": pairs[::-1].tolist()})
    mean, covariance = agreement._chance(frame)
    np.testing.assert_allclose(mean, pairs.reshape(40, 2, 3).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(covariance[1], np.cov(pairs[:, 3:].T, bias=True), atol=1e-6)
    monkeypatch.setattr(agreement, "REFERENCES", 9)
    few, others = agreement._chance(frame)[0], agreement._chance(turned)[0]
    assert (few == others).all()
    assert not np.allclose(few, mean)


def test_equal_pairs_score_nothing() -> None:
    side = np.tile(unit(np.ones(4)), (3, 1))
    zeros = np.zeros((2, 4, 4))
    found = agreement.scores(np.concatenate([side, side], axis=1), np.stack([side[0], side[0]]), zeros)
    assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("share", "least"),
    [(0.0, -5), (0.09, -5), (0.1, -1), (0.49, -1), (0.5, 3), (0.99, 3), (1.0, 4)],
)
def test_the_quantile_is_exact_and_equal_scores_stay_together(share: float, least: int) -> None:
    assert agreement._quantile([-5, -1, 3], [10, 40, 50], share) == least


def test_the_quantile_of_nothing() -> None:
    assert agreement._quantile([], [], 0.5) is None
