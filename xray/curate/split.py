"""The split into train and test, by identity: what shows the same thing falls on one side."""

from __future__ import annotations

from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataFrame, DataType, Series, col, lit
from daft.functions import coalesce, concat, when
from daft.functions import hash as hashed

from xray.curate.duplicates import LOOKS, tied_hashes
from xray.curate.frame import keeping
from xray.curate.neighbours import components
from xray.curate.step import Context, Step, stored
from xray.data.clean import split_of

GIVEN = col("identity") != lit("")
LARGE, SHOWN = 0.01, 12  # share of the samples at which an identity is named, and how many are


def split_by_identity(frame: DataFrame | None, context: Context) -> DataFrame:
    """Give every sample its identity and its split.

    Samples are of one identity if the source says so, if they look alike whatever their colours, or if others tie them:
    what looks like a sample with a given identity takes that. An identity is named by the smallest given one, else by
    the smallest perceptual hash ("looks:" and 16 hexadecimal digits), else by the sample's id. Columns set: `identity`,
    `split` ("train" or "test", see `xray.data.clean.split_of`) and, where it is there, `copies`: no test sample is
    replicated.

    Facts: `identities`, their number, and `large`: those that hold more than LARGE of the samples, which make the share
    of the test split uncertain, each with `identity`, `split` and `samples`.
    """
    assert frame is not None
    settings = context.settings
    shown = frame.with_column("look", col("phash"))
    near = context.earlier.get("near_duplicates")
    ties = stored(near / LOOKS) if near else tied_hashes(frame.where(col("phash").not_null()), context)
    shown = _tied(shown, "look", ties)
    if frame.where(GIVEN).limit(1).count_rows():
        shown = _with_given(shown, context)
    else:
        shown = shown.with_columns({"group": col("look"), "name": lit(None).cast(DataType.string())})
    looks = concat(lit("looks:"), hexadecimal(col("look")))
    named = shown.with_column("identity", coalesce(col("name"), looks, col("id")))
    named = named.with_column("split", split_of_all(col("identity"), settings.seed, settings.test_share))
    if "copies" in frame.column_names:
        test = col("split") == "test"
        named = named.with_column("copies", when(test, lit(1).cast(DataType.int32())).otherwise(col("copies")))
    context.facts.update(_facts(named))
    return keeping(named.exclude("look", "group", "name"))


STEP = Step("split", split_by_identity, reads=("seed", "test_share"))


def _tied(frame: DataFrame, column: str, ties: DataFrame) -> DataFrame:
    """Values of a column replaced by the group that they are tied to."""
    tied = frame.join(ties.select(col("node").alias(column), col("group").alias("tie")), on=column, how="left")
    return tied.with_column(column, coalesce(col("tie"), col(column))).exclude("tie")


def _with_given(frame: DataFrame, context: Context) -> DataFrame:
    """With `group`, which joins looks and given identities, and `name`, the smallest given identity in it."""
    frame = frame.with_column("given", when(GIVEN, hashed(col("identity"))).otherwise(lit(None)))
    pairs = frame.where(col("given") != col("look")).select(col("given").alias("a"), col("look").alias("b")).distinct()
    ties = components(pairs, context, "identities")
    frame = _tied(frame.with_column("group", coalesce(col("look"), col("given"))), "group", ties)
    names = frame.where(GIVEN).groupby("group").agg(col("identity").min().alias("name"))
    return frame.join(context.keep(names, "names"), on="group", how="left").exclude("given")


def _facts(frame: DataFrame) -> dict[str, Any]:
    counts = frame.groupby("group").agg(col("id").count().alias("samples")).collect()
    total = counts.agg(col("samples").sum()).to_pydict()["samples"][0] or 0
    known = counts.where(col("group").not_null())
    alone = total - (known.agg(col("samples").sum()).to_pydict()["samples"][0] or 0)
    large = known.where(col("samples") > lit(LARGE * total)).sort(["samples", "group"], desc=[True, False]).limit(SHOWN)
    large = large.select("group").collect()
    rows = []
    if large.count_rows():
        found = frame.join(large, on="group", how="semi").groupby("identity", "split")
        rows = (
            found.agg(col("id").count().alias("samples")).sort(["samples", "identity"], desc=[True, False]).to_pylist()
        )
    return {"identities": known.count_rows() + alone, "large": rows}


@daft.func.batch(return_dtype=DataType.string())
def hexadecimal(numbers: Series) -> pa.Array:
    """Numbers, uint64, as 16 digits each."""
    values = numbers.to_arrow()
    digits = values.fill_null(0).to_numpy().astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, 16 * (len(values) + 1), 16, dtype=np.int64)
    text = pa.LargeStringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(digits))
    return pc.if_else(values.is_valid(), text, None)


@daft.func.batch(return_dtype=DataType.string())
def split_of_all(identities: Series, seed: int, test_share: float) -> pa.Array:
    """The splits of identities, see `xray.data.clean.split_of`."""
    return pa.array([split_of(identity, seed, test_share) for identity in identities.to_pylist()], pa.string())
