"""Duplicates, by pixels, by looks and by text: of each group the best one stays.

The best has the most pixels (width x height x frames), then the longest caption, then the smallest key; every worker
finds the same one. The others name it.
"""

from __future__ import annotations

import daft
import numpy as np
import pyarrow as pa
from daft import DataFrame, DataType, Expression, Series, Window, col, lit
from daft.functions import (
    bitwise_xor,
    coalesce,
    concat,
    length,
    list_agg_distinct,
    list_count,
    list_distinct,
    list_sort,
    lpad,
    row_number,
    substr,
    to_struct,
    when,
)
from daft.functions import hash as hashed
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from xray.curate.frame import drop, keeping
from xray.curate.neighbours import components, near_pairs, num_words, text_pairs, words_of
from xray.curate.step import Context, Step, written
from xray.data.clean import COLOUR_SIDE, MEAN_DIFFERENCE, alike_colours
from xray.data.decoding import spread

LOOKS = "looks"  # artefact of near_duplicates: `node`, a perceptual hash, and `group`, the smallest one it is tied to
EXAMPLES, EXAMPLE_IDS = 12, 8
REACH = 256  # a picture is compared with this many of its look that are next in brightness
LARGEST, DIGITS, KEY_DIGITS = 10**15, 16, 20  # LARGEST: more than the pixels of a clip, the characters of a caption
COLOURS = (3, COLOUR_SIDE, COLOUR_SIDE, 3)  # of the first, middle and last frame
SEEN = ("id", "key", "phash", "colours", "frame_hashes")
GROUPED = DataType.list(DataType.struct({"id": DataType.string(), "group": DataType.uint64()}))


def exact_duplicates(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop samples whose pixels another has; in a table without pixels, those whose perceptual hash and caption.

    Equal pixels show the same things, so the one that stays takes the tags of all, sorted; `facts["tags_united"]`
    counts those that gained some. Samples with neither pixels nor hash stay: a caption alone makes no pair.
    """
    assert frame is not None
    row = concat(concat(col("phash").cast(DataType.string()), lit(" ")), col("caption"))  # null without a hash
    digest = coalesce(hashed(col("pixels")), bitwise_xor(hashed(col("caption")), col("phash")))
    likely = _several(frame.with_column("digest", digest).where(col("digest").not_null()), "digest")
    likely = likely.with_column("group", coalesce(col("pixels"), row))
    members = context.keep(_several(_ranked(likely, "group", "tags"), "group"), "members")
    verdicts = _verdicts(members, context).join(members.select("id", "tags"), on="id")
    verdicts = verdicts.join(_united_tags(members), on="group", how="left")
    gains = (col("id") == col("stays")) & (list_count(col("united")) > list_count(list_distinct(col("tags"))))
    verdicts = verdicts.select("id", "stays", when(gains, col("united")).otherwise(lit(None)).alias("united"))
    verdicts = context.keep(verdicts, "verdicts")
    context.facts["tags_united"] = verdicts.where(col("united").not_null()).count_rows()
    told = keeping(frame).join(verdicts, on="id", how="left")
    told = told.with_column("tags", coalesce(col("united"), col("tags")))
    repeats = col("id") != col("stays")
    told = drop(told, repeats & col("pixels").not_null(), "the same pixels as another", col("stays"))
    return drop(told, repeats, "the same hash and caption as another", col("stays")).exclude("stays", "united")


EXACT = Step("exact_duplicates", exact_duplicates)


def near_duplicates(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop pictures and clips that are nearly others.

    Their perceptual hashes differ in `near_bits` bits at most and, where they were decoded, the colours of their parts
    hardly differ; of a clip, most frames look alike too. What is tied to another through a third one is its duplicate
    as well. The same shape in other colours is no duplicate, but of the same identity (see `split`); nor is a still of
    a clip. Of more than REACH pictures of one look and brightness not all are compared with one another.
    """
    assert frame is not None
    known = frame.where(col("phash").not_null())
    looks = written(tied_hashes(known, context), context.folder / LOOKS)
    members = context.keep(_several(_tied(_ranked(known, "phash"), "phash", looks), "group"), "looks-members")
    table = context.table("decode") if "decode" in context.earlier else None
    if table is not None and "colours" in table.column_names:
        seen = members.join(table.select("id", "colours", "frame_hashes"), on="id").where(col("colours").not_null())
        lists = seen.groupby("group").agg(to_struct(*(col(name) for name in SEEN)).list_agg().alias("pictures"))
        same = lists.select(same_pictures(col("pictures"), context.settings.near_bits).alias("same")).explode("same")
        same = same.select(col("same")["id"].alias("id"), col("same")["group"].alias("picture"))
        named = concat(lit("picture "), col("picture").cast(DataType.string()))
        looked = concat(lit("look "), col("group").cast(DataType.string()))
        members = members.join(same, on="id", how="left").with_column("group", coalesce(named, looked))
        members = context.keep(members, "members")
    return _without_repeats(frame, members, "nearly the same picture as another", context)


NEAR = Step("near_duplicates", near_duplicates, reads=("near_bits",))


def text_duplicates(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop samples whose long caption is nearly another's.

    Short captions repeat with good reason; a long one that returns is a template, or was taken for several pictures.
    """
    assert frame is not None
    similarity = context.settings.text_similarity
    if not similarity:
        return keeping(frame)
    texts = frame.with_column("words", words_of(col("caption")))
    texts = texts.where(num_words(col("words")) >= lit(context.settings.text_words))
    texts = context.keep(_ranked(texts.with_column("text", hashed(col("words"))), "text", "words"), "texts")
    ties = components(text_pairs(texts.select("text", "words"), similarity, context), context, "texts")
    members = context.keep(_several(_tied(texts.exclude("words"), "text", ties), "group"), "members")
    return _without_repeats(frame, members, "nearly the same caption as another", context)


TEXT = Step("text_duplicates", text_duplicates, reads=("text_similarity", "text_words"))


def tied_hashes(frame: DataFrame, context: Context) -> DataFrame:
    """The perceptual hashes that look like smaller ones, itself or through others.

    Args:
        frame: with `phash`, not null.
        context: of the running step.

    Returns:
        Columns `node` and `group`, as of `neighbours.components`.
    """
    hashes = context.keep(frame.select("phash").distinct(), "hashes")
    return components(near_pairs(hashes, context.settings.near_bits), context, "hashes")


@daft.func.batch(return_dtype=GROUPED, batch_size=256)
def same_pictures(pictures: Series, near_bits: int) -> pa.Array:
    """Find near duplicates within lists of pictures of one look.

    Args:
        pictures: lists of `SEEN`; `colours` are bytes of the shape COLOURS, `frame_hashes` one for each of some frames.
        near_bits: see `Settings`.

    Returns:
        For each list `id` and `group`, the smallest key among its near duplicates.
    """
    lists = pictures.to_arrow()
    lengths = np.diff(lists.offsets.to_numpy())
    within = np.repeat(np.arange(len(lists)), lengths)
    seen = lists.flatten()
    key, phash = (seen.field(name).to_numpy(zero_copy_only=False) for name in ("key", "phash"))
    hashes = [np.asarray(each or [], np.uint64) for each in seen.field("frame_hashes").to_pylist()]
    colours = np.frombuffer(b"".join(seen.field("colours").to_pylist()), np.uint8).reshape(len(seen), *COLOURS)
    means = colours.mean(axis=(2, 3))  # their differences are the colours' at most
    brightness = means.mean(axis=(1, 2))
    is_clip = np.array([len(each) > 1 for each in hashes], bool)
    order = np.lexsort((key, phash, brightness, is_clip, within))
    group = np.arange(len(seen))
    ties = np.empty((2, 0), np.intp)
    for distance in range(1, min(REACH, len(order) - 1) + 1):
        pairs = np.stack([order[:-distance], order[distance:]])
        one, other = pairs
        close = (within[one] == within[other]) & (is_clip[one] == is_clip[other])
        close &= brightness[other] - brightness[one] <= MEAN_DIFFERENCE
        if not close.any():
            break
        close &= (group[one] != group[other]) & (np.bitwise_count(phash[one] ^ phash[other]) <= near_bits)
        pairs = pairs[:, close]
        pairs = pairs[:, np.abs(means[pairs[0]] - means[pairs[1]]).mean(axis=(1, 2)) <= MEAN_DIFFERENCE]
        same = [
            alike_colours(colours[a], colours[b]) and alike_frames(hashes[a], hashes[b], near_bits) for a, b in pairs.T
        ]
        if any(same):
            ties = np.concatenate([ties, pairs[:, same]], axis=1)
            edges = coo_array((np.ones(ties.shape[1], bool), (ties[0], ties[1])), shape=(len(seen), len(seen)))
            group = connected_components(edges, directed=False)[1]
    smallest = np.full(len(seen), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, group, key)
    groups = pa.StructArray.from_arrays([seen.field("id"), pa.array(smallest[group])], names=["id", "group"])
    return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), groups)


def alike_frames(one: np.ndarray, other: np.ndarray, near_bits: int) -> bool:
    """Whether most frames look alike, by the perceptual hashes, uint64, of some that are evenly spread over each."""
    wanted = min(len(one), len(other))
    one, other = one[spread(len(one), wanted)], other[spread(len(other), wanted)]
    return bool(2 * (np.bitwise_count(one ^ other) <= near_bits).sum() > wanted) if wanted else True


def _ranked(frame: DataFrame, *columns: str) -> DataFrame:
    """Ids, the named columns, and what decides who stays."""
    area = col("width").cast(DataType.int64()) * col("height") * col("frames")
    size = length(col("caption")).cast(DataType.int64())
    measures = [coalesce(area, lit(0)).alias("area"), size.alias("length")]
    return frame.select("id", "key", *columns, *measures)


def _several(frame: DataFrame, name: str) -> DataFrame:
    """The rows whose value in a column other rows have too."""
    counts = frame.groupby(name).agg(col("id").count().alias("count"))
    return frame.join(counts.where(col("count") > lit(1)).select(name), on=name, how="semi")


def _tied(frame: DataFrame, name: str, ties: DataFrame) -> DataFrame:
    """With `group`, of the value in a column or, where nothing ties it to others, the value itself."""
    tied = frame.join(ties.with_column_renamed("node", name), on=name, how="left")
    return tied.with_column("group", coalesce(col("group"), col(name)))


def _without_repeats(frame: DataFrame, members: DataFrame, reason: str, context: Context) -> DataFrame:
    verdicts = context.keep(_verdicts(members, context).where(col("id") != col("stays")), "verdicts")
    told = keeping(frame).join(verdicts.select("id", "stays"), on="id", how="left")
    return drop(told, col("stays").not_null(), reason, col("stays")).exclude("stays")


def _verdicts(members: DataFrame, context: Context) -> DataFrame:
    """Who stays, for the members of groups of several; and the groups' number, sizes and some examples as facts.

    Args:
        members: what `_ranked` gives, and `group`.
        context: of the running step.

    Returns:
        Columns `id`, `group` and `stays`, an id.
    """
    parts = [_digits(lit(LARGEST) - col("area"), DIGITS), _digits(lit(LARGEST) - col("length"), DIGITS)]
    rank = concat(concat(concat(*parts), _digits(col("key"), KEY_DIGITS)), col("id"))
    members = members.select("id", "group", rank.alias("rank"))
    groups = members.groupby("group").agg(col("rank").min().alias("best"), col("id").count().alias("size"))
    groups = context.keep(groups.where(col("size") > lit(1)), "groups")
    members = context.keep(members.join(groups, on="group"), "ranked")
    facts = groups.agg(col("size").count().alias("groups"), col("size").max().alias("largest")).to_pylist()[0]
    context.facts.update(groups=facts["groups"], largest=facts["largest"] or 0, examples=_examples(groups, members))
    return members.select("id", "group", substr(col("best"), 2 * DIGITS + KEY_DIGITS).alias("stays"))


def _digits(number: Expression, width: int) -> Expression:
    """A number as text that sorts as it does."""
    return lpad(number.cast(DataType.string()), width, "0")


def _examples(groups: DataFrame, members: DataFrame) -> list[list[str]]:
    """Ids of the largest groups, best first."""
    shown = groups.sort(["size", "best"], desc=[True, False]).limit(EXAMPLES).to_pydict()
    if not shown["best"]:
        return []
    within = members.where(col("best").is_in(shown["best"])).select("id", "best", "rank")
    number = row_number().over(Window().partition_by("best").order_by("rank"))
    rows = within.with_column("number", number).where(col("number") <= lit(EXAMPLE_IDS)).sort("rank").to_pydict()
    examples: dict[str, list[str]] = {best: [] for best in shown["best"]}
    for id, best in zip(rows["id"], rows["best"], strict=True):
        examples[best].append(id)
    return list(examples.values())


def _united_tags(members: DataFrame) -> DataFrame:
    tags = members.select("group", "tags").explode("tags").where(col("tags").not_null())
    united = tags.groupby("group").agg(list_agg_distinct(col("tags")).alias("united"))
    return united.with_column("united", list_sort(col("united")))
