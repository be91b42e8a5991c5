"""Pairs whose text does not fit the picture, by a CLIP model.

A pair's cosine says little by itself: captions such as "icon" are near every picture, and some pictures near every
caption. So a pair is compared with chance, both ways: by how many standard deviations is it nearer than this picture
is to other captions, and than this caption is to other pictures? The score is the mean of the two. Like the inverted
softmax (Smith et al., arXiv 1702.03859) it takes hubs out, and it means the same for any model. The others are the
same `REFERENCES` pairs for all, of which mean and covariance are all that is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import daft
import numpy as np
import torch
from daft import DataFrame, DataType, col, lit
from daft.functions import format as formatted
from daft.functions import hash as hashed

from xray.curate.frame import SCORED, drop, keeping
from xray.curate.settings import Settings
from xray.curate.step import Context, Step
from xray.data import DataError, Sample, Tokenizer, transforms, with_tags
from xray.data.download import sha256_of
from xray.data.shards import decode_stored
from xray.models import CheckpointError, Clip, load, read_header

REASON = "caption and picture do not agree"
REFERENCES = 4096  # pairs that stand for chance
REFERENCE_SEED = 7  # of the hash that draws them
BATCH = 64  # pairs a forward pass, always: a row's numbers must not depend on what comes with it
PARTS = 100  # scores are rounded to this part of a standard deviation, so that they can be counted
WEIGHTS = "model.safetensors"


def agree(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop the pairs that agree least; without a checkpoint all stay.

    It adds `agreement`, float32, in standard deviations above chance, where a random caption has 0 on average. It is
    null without a caption or media, and such samples stay. The facts are `scored`, the `threshold` that the pairs
    which stay reach (null without any) and the `histogram`, pairs of score and count.

    Raises:
        DataError: the checkpoint is no CLIP model with its tokenizer.
    """
    assert frame is not None
    path = model_file(context.settings)
    if path is None:
        return keeping(frame.with_column("agreement", lit(None).cast(SCORED["agreement"])))
    _check(path)
    pairs = context.keep(_embedded(frame, context.table("decode"), path), "pairs")
    mean, covariance = _chance(pairs)
    chance = context.folder / "chance.npz"
    np.savez(chance, mean=mean, covariance=covariance)
    scored = context.keep(pairs.select("id", Scorer(str(chance))(col("pair")).alias("score")), "scored")
    counts = scored.groupby("score").agg(col("id").count().alias("count")).sort("score").to_pydict()
    least = _quantile(counts["score"], counts["count"], context.settings.agreement)
    context.facts["threshold"] = None if least is None else least / PARTS
    context.facts["scored"] = sum(counts["count"])
    context.facts["histogram"] = [
        [score / PARTS, count] for score, count in zip(counts["score"], counts["count"], strict=True)
    ]
    frame = keeping(frame.join(scored, on="id", how="left"))
    said = formatted("{} standard deviations above chance", (col("score") / PARTS).round(2))
    frame = drop(frame, col("score") < lit(least), REASON, said)
    return frame.with_column("agreement", (col("score") / PARTS).cast(SCORED["agreement"])).exclude("score")


def model_file(settings: Settings) -> Path | None:
    """The checkpoint that the settings name: a file, or the one in a run's folder; None where they name none."""
    if not settings.checkpoint:
        return None
    path = Path(settings.checkpoint)
    return path / WEIGHTS if path.is_dir() else path


def _digest(source: str, settings: Settings) -> str | None:
    """Of the model's file, so that a model trained anew is used anew."""
    path = model_file(settings)
    if path is None:
        return None
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(
            f"checkpoint is {settings.checkpoint}, and {path} cannot be read ({error.strerror}); "
            f"a {WEIGHTS} of a CLIP model or its run's folder is needed"
        ) from error


def _check(path: Path) -> None:
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    if header.kind != "clip" or "tokenizer" not in header.metadata:
        found = f"a {header.kind!r} model" if header.kind != "clip" else "a CLIP model without its tokenizer"
        raise DataError(f"checkpoint {path} holds {found}; a CLIP model that `xray train` made is needed")


def _embedded(frame: DataFrame, decoded: DataFrame, path: Path) -> DataFrame:
    """id and `pair`, the picture's embedding and after it the text's; without pairs that lack one of the two."""
    media = decoded.where(col("data").not_null()).select("id", "data")
    columns = ("media", "frames", "caption", "tags")
    pairs = media.join(frame.select("id", *columns), on="id", how="inner")
    pair = Embedder(str(path))(col("data"), *(col(name) for name in columns))
    return pairs.select("id", pair.alias("pair")).where(col("pair").not_null())


@daft.cls
class Embedder:
    """A CLIP model, loaded once a process, on its GPU if it has one."""

    def __init__(self, path: str) -> None:
        model, header = load(path, kind="clip")
        assert isinstance(model, Clip)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.tokenizer = Tokenizer.load(header["tokenizer"])
        self.caption_tags = int(json.loads(header.get("recipe", "{}")).get("caption_tags", 0))
        vision = model.config.vision
        self.transform = transforms.evaluate(vision.image_size, vision.num_frames)
        self.decoders = ThreadPoolExecutor(thread_name_prefix="decode")

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=4 * BATCH)
    def __call__(self, data: Any, media: Any, frames: Any, captions: Any, tags: Any) -> Any:
        """Series of the columns to a list of 2 D numbers a row, null where there is no text."""
        texts = with_tags(zip(captions.to_pylist(), tags.to_pylist(), strict=True), self.caption_tags)
        pairs: list[np.ndarray | None] = [None] * len(texts)
        groups: dict[bool, list[int]] = {False: [], True: []}  # images and clips cannot share a batch
        kinds = media.to_pylist()
        for row, text in enumerate(texts):
            if text:
                groups[kinds[row] == "clip"].append(row)
        stored = list(zip(data.to_pylist(), kinds, frames.to_pylist(), strict=True))
        for rows in groups.values():
            for start in range(0, len(rows), BATCH):
                chosen = rows[start : start + BATCH]
                pixels = torch.stack(list(self.decoders.map(self._pixels, (stored[row] for row in chosen))))
                embedded = self._embed(pixels, [texts[row] for row in chosen])
                for row, pair in zip(chosen, embedded, strict=True):
                    pairs[row] = pair
        return pairs

    def _pixels(self, stored: tuple[bytes, str, int]) -> torch.Tensor:
        data, media, count = stored
        frames = decode_stored(data, count)
        image = frames if media == "clip" else frames[0]
        return self.transform(Sample("", media, "", [], "", image), None)

    @torch.inference_mode()
    def _embed(self, pixels: torch.Tensor, texts: Sequence[str]) -> np.ndarray:
        """(B, 2 D) float32 of B <= BATCH pairs; the shapes are always those of a full batch."""
        count = len(texts)
        padded = torch.cat([pixels, pixels.new_zeros(BATCH - count, *pixels.shape[1:])])
        ids, lengths = self.tokenizer([*texts, *[""] * (BATCH - count)], self.model.config.text.context_length)
        images = self.model.encode_image(padded.to(self.device))
        captions = self.model.encode_text(ids.to(self.device), lengths.to(self.device))
        return torch.cat([images, captions], dim=1)[:count].float().cpu().numpy()


def _chance(pairs: DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Mean (2, D) and covariance (2, D, D), float64, of pictures and of texts: those of a sample of pairs.

    The sample has the smallest hashes, so it is the same on every worker.
    """
    draw = hashed(col("id"), seed=lit(REFERENCE_SEED))
    drawn = pairs.with_column("draw", draw).sort(["draw", "id"]).limit(REFERENCES).select("pair").to_pydict()["pair"]
    if not drawn:
        return np.zeros((2, 0)), np.zeros((2, 0, 0))
    sides = np.asarray(drawn, np.float64).reshape(len(drawn), 2, -1).swapaxes(0, 1)
    mean = sides.mean(axis=1)
    centred = sides - mean[:, None]
    return mean, centred.swapaxes(1, 2) @ centred / len(drawn)


@daft.cls
class Scorer:
    """Pairs against chance."""

    def __init__(self, chance: str) -> None:
        with np.load(chance) as stored:
            self.mean, self.covariance = stored["mean"], stored["covariance"]

    @daft.method.batch(return_dtype=DataType.int32(), batch_size=16_384)
    def __call__(self, pairs: Any) -> Any:
        """A series of pairs to their scores in `PARTS`, int32."""
        numbers = pairs.to_arrow().flatten().to_numpy().astype(np.float64)
        return scores(numbers.reshape(len(pairs), -1), self.mean, self.covariance)


def scores(pairs: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Standard deviations above chance of pairs (N, 2 D) float64, in `PARTS`, int32 (N,)."""
    sides = pairs.reshape(len(pairs), 2, -1).swapaxes(0, 1)  # (2, N, D): pictures, texts
    cosine = (sides[0] * sides[1]).sum(axis=1)
    total = np.zeros(len(pairs))
    for own, other in ((0, 1), (1, 0)):
        expected = sides[own] @ mean[other]
        deviation = np.sqrt(np.maximum(np.einsum("nd,de,ne->n", sides[own], covariance[other], sides[own]), 0.0))
        total += np.where(deviation > 1e-6, (cosine - expected) / np.maximum(deviation, 1e-6), 0.0) / 2
    return np.rint(total * PARTS).astype(np.int32)


def _quantile(values: Sequence[int], counts: Sequence[int], share: float) -> int | None:
    """The value below which at most `share` of all lie, as close to it as equal values allow.

    Args:
        values: distinct, ascending.
        counts: how many have each.
        share: from 0 to 1.

    Returns:
        One of `values`; one above all of them where all lie within `share`; None without values.
    """
    if not values:
        return None
    below = np.cumsum(counts)
    place = int(np.searchsorted(below, share * below[-1] * (1 + 1e-12), side="right"))
    return values[place] if place < len(values) else values[-1] + 1


STEP = Step("agreement", agree, reads=("checkpoint", "agreement"), inputs=_digest)
