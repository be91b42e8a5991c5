"""The columns that a sample has on its way through the steps, and the two that say why it leaves.

A step takes a frame of these columns and returns the same rows with `reason` and `detail` filled in where a sample
is dropped. What later steps may need of the pixels is heavy, and stays in the table of the step that made it.
"""

from __future__ import annotations

from daft import DataFrame, DataType, Expression, col, lit
from daft.functions import hash as hashed
from daft.functions import when

TEXT, TEXTS, NUMBER = DataType.string(), DataType.list(DataType.string()), DataType.int32()
BYTES, HASH = DataType.binary(), DataType.uint64()

# what `read` makes of every source
COLUMNS: dict[str, DataType] = {
    "id": TEXT,  # unique
    "key": HASH,  # hash of the id: joins, order and draws go by it
    "source": TEXT,  # the set it comes from
    "url": TEXT,  # of its file, or of the shard that holds it; "" where the table holds no media
    "offset": DataType.int64(),  # of its bytes in the shard; null: the whole file
    "size": DataType.int64(),
    "strip": NUMBER,  # frames that stand one below the other in its image, as this package stores clips; null: none
    "media": TEXT,  # "image", "clip", "" if unknown until it is decoded
    "caption": TEXT,  # never null; may be ""
    "alternatives": TEXTS,  # other texts that may stand in for a caption that says nothing: words of the file's name
    "tags": TEXTS,  # never null
    "label": TEXT,
    "identity": TEXT,  # what it shows, if the source knows: one identity never straddles the split
    "phash": HASH,  # perceptual hash of the middle frame, null if unknown
}
# what `decode` adds
MEASURES: dict[str, DataType] = {
    "extension": TEXT,  # of the encoded media
    "width": NUMBER,
    "height": NUMBER,
    "frames": NUMBER,
    "data_size": DataType.int64(),  # bytes of the encoded media
    "pixels": TEXT,  # digest of all frames: equal pixels, equal digest; null if nothing was decoded
}
# what later steps add
SCORED = {"agreement": DataType.float32()}  # agreement: of caption and media, in standard deviations above chance
MATCHED = {"entries": DataType.list(NUMBER)}  # match: numbers of the metadata's entries in the caption
BALANCED = {"probability": DataType.float64(), "copies": NUMBER}  # balance: expected copies, and copies drawn
SPLIT = {"split": TEXT}

# Columns that no step passes on. `bytes` is what a table or shard embeds; `data` (encoded media), `colours` (uint8
# 16 x 16 x 3 means of the first, middle and last frame) and `frame_hashes` (list of perceptual hashes) are decode's.
HEAVY = ("bytes", "data", "colours", "frame_hashes")


def keeping(frame: DataFrame) -> DataFrame:
    """The frame with nothing dropped yet: `reason` and `detail` null."""
    return frame.with_columns({"reason": lit(None).cast(TEXT), "detail": lit(None).cast(TEXT)})


def drop(frame: DataFrame, condition: Expression, reason: str, detail: Expression | None = None) -> DataFrame:
    """Give the samples that `condition` picks, and that nothing dropped before, their reason to leave.

    Args:
        frame: with `reason` and `detail`.
        condition: boolean; null counts as false.
        reason: a few words, the same for all samples that leave for it: the ledger counts by it.
        detail: text that names what is special about each sample, such as the id it repeats.
    """
    leaving = col("reason").is_null() & condition.fill_null(False)
    said = lit(None).cast(TEXT) if detail is None else detail
    return frame.with_columns(
        {
            "detail": when(leaving, said).otherwise(col("detail")),
            "reason": when(leaving, lit(reason)).otherwise(col("reason")),
        }
    )


def kept(frame: DataFrame) -> DataFrame:
    """What a step's table passes on: the samples without a reason, less the heavy columns."""
    heavy = [name for name in (*HEAVY, "reason", "detail") if name in frame.column_names]
    return frame.where(col("reason").is_null()).exclude(*heavy)


def key_of(id: Expression) -> Expression:
    """The key of an id."""
    return hashed(id)
