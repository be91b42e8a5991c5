"""Values as people store them, made into text, lists of tags and 64-bit hashes."""

from __future__ import annotations

import ast
import csv
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, Series
from daft import func as daft_func

BETWEEN = "\x1f"  # ASCII's unit separator: no tag holds it


def text_of(value: Any) -> str | None:
    """A JSON value as text: numbers as they are written, the first of a list; None if it says nothing.

    Half a character, which JSON can hold, becomes a question mark.
    """
    if isinstance(value, list):
        value = next((part for part in value if part is not None), None)
    if (
        value is None
        or isinstance(value, bool | list | dict)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        return None
    return str(value).encode(errors="replace").decode()


def tags_of(value: Any) -> list[str]:
    """Tags from a JSON value: a list of strings and numbers, or what `split` takes."""
    parts = split(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
    texts = (text_of(part) for part in parts)
    return [text.strip() for text in texts if text is not None and text.strip()]


def split(text: str) -> list[Any]:
    """Tags from one string: a JSON or Python list, or separated by ";", else by "#", else by commas, where quotes
    hold together what belongs together.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list):
                return found
    if ";" in text:
        return text.split(";")
    if "," not in text and text.startswith("#"):
        return text.split("#")
    if '"' in text:
        return next(csv.reader([" ".join(text.splitlines())], skipinitialspace=True), [])
    return text.split(",")


def tag_lists(tags: pa.Array) -> pa.Array:
    """`tags_of` for an Arrow array of strings or of lists of strings: a list of strings each, none null."""
    if not (pa.types.is_list(tags.type) or pa.types.is_large_list(tags.type)):
        tags = pc.split_pattern(_joined(tags.cast(pa.string())), BETWEEN)
    values = pc.utf8_trim_whitespace(tags.flatten().cast(pa.string()))
    said = pc.fill_null(pc.not_equal(values, ""), False)
    lengths = pc.fill_null(pc.list_value_length(tags), 0)
    ends = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))])
    before = np.concatenate([[0], np.cumsum(said.to_numpy(zero_copy_only=False))])  # said among the first n values
    return pa.ListArray.from_arrays(pa.array(before[ends], pa.int32()), values.filter(said))


def _joined(texts: pa.Array) -> pa.Array:
    """Strings of tags with one separator: at once for the plain ones, one by one for those with lists or quotes."""
    texts = pc.fill_null(texts, "")
    plain = pc.if_else(
        pc.match_substring(texts, ";"),
        pc.replace_substring(texts, ";", BETWEEN),
        pc.replace_substring(texts, ",", BETWEEN),
    )
    odd = pc.match_substring_regex(texts, r'^\s*[\[#]|"')
    if not pc.any(odd).as_py():
        return plain
    one_by_one = [BETWEEN.join(tags_of(text)) for text in texts.filter(odd).to_pylist()]
    return pc.replace_with_mask(plain, odd, pa.array(one_by_one, pa.string()))


def hashes(values: pa.Array) -> pa.Array:
    """64-bit hashes from integers of either sign or from strings, 16 hexadecimal digits or else decimal: uint64,
    null for anything else.
    """
    if pa.types.is_integer(values.type):
        bits = pc.fill_null(values, 0).cast(pa.uint64() if pa.types.is_uint64(values.type) else pa.int64())
        return pa.array(bits.to_numpy(zero_copy_only=False).view(np.uint64), mask=_nulls(values))
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return pa.nulls(len(values), pa.uint64())
    return pa.array([_hash(text) for text in values.to_pylist()], pa.uint64())


def _hash(text: str | None) -> int | None:
    text = (text or "").strip()
    try:
        number = int(text, 16 if len(text) == 16 and not text.startswith("-") else 10)
    except ValueError:
        return None
    return number % 2**64 if -(2**63) <= number < 2**64 else None


def _nulls(values: pa.Array) -> np.ndarray:
    return values.is_null().to_numpy(zero_copy_only=False)


def texts_of(data: Sequence[bytes | None]) -> list[str | None]:
    """Files' bytes as text, with U+FFFD for what is no UTF-8."""
    return [None if part is None else part.decode("utf-8-sig", errors="replace") for part in data]


def _array(series: Series) -> pa.Array:
    array = series.to_arrow()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


@daft_func.batch(return_dtype=DataType.list(DataType.string()))
def tag_column(tags: Series) -> pa.Array:
    """`tag_lists` of a column."""
    return tag_lists(_array(tags))


@daft_func.batch(return_dtype=DataType.uint64())
def hash_column(values: Series) -> pa.Array:
    """`hashes` of a column."""
    return hashes(_array(values))


@daft_func.batch(return_dtype=DataType.string())
def text_column(data: Series) -> pa.Array:
    """`texts_of` of a column."""
    return pa.array(texts_of(_array(data).to_pylist()), pa.string())


@daft_func.batch(return_dtype=DataType.string())
def digest_column(missing: Series, *content: Series) -> pa.Array:
    """Digest of a row's content where it is `missing`, null elsewhere: few rows need one, and hashing is dear.

    Daft's own hash of several columns forgets those before a null number or an empty list.
    """
    wanted = pc.fill_null(_array(missing), False)
    if not pc.any(wanted).as_py():
        return pa.nulls(len(wanted), pa.string())
    joined = pc.binary_join_element_wise(
        *(_as_text(column.filter(Series.from_arrow(wanted))) for column in content),
        pa.scalar("\x1e", pa.large_string()),
        null_handling="replace",
        null_replacement="",
    )
    digests = _array(Series.from_arrow(joined).hash()).cast(pa.string())
    return pc.replace_with_mask(pa.nulls(len(wanted), pa.string()), wanted, digests)


def _as_text(column: Series) -> pa.Array:
    values = _array(column)
    if pa.types.is_large_binary(values.type) or pa.types.is_binary(values.type):
        return pc.if_else(values.is_valid(), _array(column.hash()).cast(pa.large_string()), None)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.binary_join(values, pa.scalar(BETWEEN, values.type.value_type))
    return values.cast(pa.large_string())
