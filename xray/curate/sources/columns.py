"""Which column of a table plays which part, and the frame that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from daft import DataFrame, DataType, Expression, col, element, lit
from daft.functions import (
    coalesce,
    format,
    list_count,
    list_filter,
    list_flatten,
    regexp_extract,
    regexp_replace,
    strip,
    to_list,
    when,
)

from xray.curate.frame import BYTES, HASH, NUMBER, TEXT, TEXTS
from xray.curate.sources.rows import BELOW, DETAIL, FOLDER, NOTES, PLACE, REASON
from xray.curate.sources.values import digest_column, hash_column, tag_column
from xray.data.errors import DataError

# the usual names, lower-case, the better ones first
USUAL: dict[str, tuple[str, ...]] = {
    "id": ("id", "key", "uid"),
    "caption": ("caption", "text", "title", "alt"),
    "url": ("url", "image_url", "file_name", "path", "image"),
    "image": ("image", "bytes", "jpg", "jpeg", "png", "webp", "mp4"),
    "tags": ("tags", "hashtags", "keywords"),
    "label": ("label", "class", "cls"),
    "identity": ("identity",),
    "source": ("source",),
    "phash": ("phash", "hash"),
    "alternatives": ("alternatives",),
}
NEEDED = ("caption", "tags", "url", "image")  # one of them at least
# parts that only shards and datasets of this package say
PLACES = {"shard": TEXT, "offset": DataType.int64(), "size": DataType.int64(), "media": TEXT, "strip": NUMBER}
NAME = r"([^/?#]*?)(\.[^./?#]*)?([?#].*)?$"  # last part of a path or address, less its extension
NO_MEDIA = "it names no image or clip"
EMPTY = "the row is empty"


@dataclass(frozen=True)
class Columns:
    """The parts that a table's columns play.

    Attributes:
        names: of columns, by part.
        texts: further columns that may stand in for a caption.
        unused: all others.
    """

    names: dict[str, str] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def has_media(self) -> bool:
        """Whether the table names or holds images or clips."""
        return any(part in self.names for part in ("url", "image", "shard"))


def named(setting: str) -> dict[str, str]:
    """The columns that the setting `columns` names, by part.

    Raises:
        DataError: it is no list of PART=NAME.
    """
    names: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in setting.split(","))):
        part, equals, name = (piece.strip() for piece in pair.partition("="))
        if part not in USUAL or not equals or not name:
            raise DataError(f"columns holds {pair!r}; PART=NAME is needed, PART one of {', '.join(USUAL)}")
        names[part] = name
    return names


def find(there: Mapping[str, DataType], setting: str, where: str) -> Columns:
    """Which of a table's columns are used, and for what.

    Args:
        there: the table's columns and their types.
        setting: the setting `columns`.
        where: the table, for the error.

    Raises:
        DataError: a column that was named is not there, or there is none of captions, tags or media.
    """
    given = named(setting)
    missing = [f"{name} (for {part})" for part, name in given.items() if name not in there]
    if missing:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {_list(there)}")
    lower: dict[str, str] = {}
    for name in there:
        lower.setdefault(name.lower(), name)
    names = dict(given)
    if "url" in names and _holds_media(there[names["url"]]):
        names["image"] = names.pop("url")
    taken = set(names.values())
    for part, usual in USUAL.items():
        candidates = [lower[name] for name in usual if name in lower and lower[name] not in taken]
        if part in ("url", "image"):
            wanted = part == "image"
            candidates = [name for name in candidates if _holds_media(there[name]) == wanted]
        if part not in names and candidates and not (part == "url" and "image" in given):
            names[part] = candidates[0]
            taken.add(candidates[0])
    if not any(part in names for part in NEEDED):
        raise DataError(
            f"{where} has no column of captions, tags, images or addresses (such as caption, text, tags, url, "
            f"file_name, image); it has {_list(there)}: name one, as in columns=caption=NAME"
        )
    texts = tuple(lower[name] for name in USUAL["caption"] if name in lower and lower[name] not in taken)
    unused = tuple(name for name in there if name not in taken and name not in texts)
    return Columns(names, texts, unused)


def _list(there: Mapping[str, DataType]) -> str:
    names = list(there)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "") if names else "none"


def _holds_media(dtype: DataType) -> bool:
    return dtype.is_binary() or dtype.is_fixed_size_binary() or (dtype.is_struct() and "bytes" in dtype.fields)


def shaped(frame: DataFrame, columns: Columns, source: str) -> DataFrame:
    """The columns of `frame.COLUMNS`, less `key`, with `reason`, `detail` and, where the table embeds media, `bytes`.

    Args:
        frame: a table with the notes of `rows`.
        columns: what to take of it.
        source: name of the set, for samples that say none.
    """
    types = {field.name: field.dtype for field in frame.schema()}
    names = columns.names
    made = {part: _said(_text(names.get(part), types)) for part in ("id", "caption", "label", "identity")}
    made["source"] = coalesce(_said(_text(names.get("source"), types)), lit(source))
    link = _said(_text(names.get("url"), types))
    if "image" in names:
        made["bytes"], path = _embedded(names["image"], types)
        link = coalesce(link, _said(path))
    made["link"] = regexp_replace(link, r"^(\./)+", "")
    made["texts"] = _not_blank(to_list(*(_text(name, types) for name in columns.texts), lit(None).cast(TEXT)))
    for part in ("tags", "alternatives"):
        made[part] = tag_column(_listable(names.get(part), types))
    made["phash"] = hash_column(_hashable(names.get("phash"), types))
    for part, dtype in PLACES.items():
        made[part] = (col(names[part]) if part in names else lit(None)).cast(dtype)
    frame = frame.select(*(value.alias(part) for part, value in made.items()), *map(col, NOTES))
    return _completed(frame, columns.has_media)


def _completed(frame: DataFrame, has_media: bool) -> DataFrame:
    """Addresses, ids and the texts that may stand in for a caption."""
    link, embeds = col("link"), "bytes" in frame.column_names
    words = regexp_replace(regexp_extract(link, NAME, 1).lower(), r"[^\p{L}]+", " ")
    words = strip(regexp_replace(regexp_replace(words, r"\b\p{L}{1,2}\b", ""), " +", " "))
    caption = coalesce(col("caption"), lit(""))
    others = list_flatten(to_list(col("alternatives"), col("texts"), to_list(words)))
    content = (col(name) for name in ("caption", "tags", "label", "identity", "texts", "phash", *["bytes"] * embeds))
    nameless = col(PLACE).is_null() & col("id").is_null() & link.is_null()
    by_name = format("{}:{}{}", col("source"), col(BELOW), link)
    by_content = format("{}#{}", col("source"), digest_column(nameless, *content))
    named = coalesce(col("shard"), link)
    media = named.not_null() | col("bytes").not_null() if embeds else named.not_null()
    absolute = named.contains("://") | named.startswith("/")
    nothing = (caption == lit("")) & (list_count(col("tags")) == lit(0))
    lacking = when(nothing & ~media, lit(EMPTY))
    if has_media:
        lacking = lacking.when(~media, lit(NO_MEDIA))
    made = {
        "id": coalesce(col(PLACE), col("id"), by_name, by_content),
        "source": col("source"),
        "url": when(named.is_null(), lit("")).when(absolute, named).otherwise(format("{}{}", col(FOLDER), named)),
        "offset": col("offset"),
        "size": col("size"),
        "media": coalesce(col("media"), lit("")),
        "caption": caption,
        "alternatives": _not_blank(others),
        "tags": col("tags"),
        "label": coalesce(col("label"), lit("")),
        "identity": coalesce(col("identity"), lit("")),
        "phash": col("phash"),
        "strip": col("strip"),
        **({"bytes": col("bytes")} if embeds else {}),
        "reason": coalesce(col(REASON), lacking.otherwise(lit(None).cast(TEXT))),
        "detail": col(DETAIL),
    }
    return frame.select(*(value.alias(name) for name, value in made.items()))


def _not_blank(texts: Expression) -> Expression:
    return list_filter(texts, element() != lit(""))


def _said(text: Expression) -> Expression:
    """Null for a text that is blank."""
    return when(strip(text) != lit(""), text).otherwise(lit(None).cast(TEXT))


def _text(name: str | None, types: Mapping[str, DataType]) -> Expression:
    """A column as text: numbers as they are written, the first of a list; null where it is none of these."""
    nothing = lit(None).cast(TEXT)
    if name is None:
        return nothing
    column, dtype = col(name), types[name]
    if dtype.is_list() or dtype.is_fixed_size_list():
        column, dtype = column.get(0), dtype.dtype
    if dtype.is_float32() or dtype.is_float64():
        return when(column.is_nan() | column.is_inf(), nothing).otherwise(column.cast(TEXT))
    if dtype.is_string() or dtype.is_integer() or dtype.is_temporal() or dtype.is_decimal128() or dtype.is_null():
        return column.cast(TEXT)
    return nothing


def _embedded(name: str, types: Mapping[str, DataType]) -> tuple[Expression, Expression]:
    """The bytes of a media column and the path that stands beside them, as Hugging Face stores images."""
    if not types[name].is_struct():
        return _bytes(col(name)), lit(None).cast(TEXT)
    path = col(name)["path"].cast(TEXT) if "path" in types[name].fields else lit(None).cast(TEXT)
    return _bytes(col(name)["bytes"]), path


def _bytes(data: Expression) -> Expression:
    """Null for empty bytes."""
    data = data.cast(BYTES)
    return when(data != lit(b""), data).otherwise(lit(None).cast(BYTES))


def _listable(name: str | None, types: Mapping[str, DataType]) -> Expression:
    """A column that `tag_column` takes: strings, or lists of strings."""
    if name is None:
        return lit(None).cast(TEXTS)
    if types[name].is_list() or types[name].is_fixed_size_list():
        inner = types[name].dtype
        return col(name).cast(TEXTS) if inner.is_string() or inner.is_integer() else lit(None).cast(TEXTS)
    return _text(name, types)


def _hashable(name: str | None, types: Mapping[str, DataType]) -> Expression:
    if name is None or not (types[name].is_integer() or types[name].is_string()):
        return lit(None).cast(HASH)
    return col(name)
