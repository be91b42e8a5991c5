"""What a source is, told by what is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from xray.curate.sources.files import File, is_folder, listed, matching
from xray.data.errors import DataError
from xray.data.folder import EXTENSIONS
from xray.data.shards import INDEX
from xray.data.streams import parse_sources

PARQUET, SEPARATED, LINES, SHARDS = (".parquet", ".pq"), (".csv", ".tsv"), (".jsonl", ".ndjson", ".json"), (".tar",)
TABLES = (*PARQUET, *SEPARATED, *LINES)
KIND_OF = {"shards": SHARDS, "table": TABLES}
METADATA = frozenset(f"metadata{extension}" for extension in (".csv", ".jsonl", ".parquet"))
KINDS = (
    "a Parquet, CSV or JSONL table or a pattern of several, WebDataset shards (*.tar), a folder of any of these, a "
    "folder of images and clips, or several of these with commas between is needed"
)


@dataclass(frozen=True)
class Source:
    """A source, told.

    Attributes:
        text: as it was given.
        name: of the set.
        kind: "table", "shards", "dataset" (packed or curated by this package) or "folder" (of images and clips).
        files: its tables or shards; all files of a folder; the index of a dataset.
        root: the folder, with a slash behind it; "" if it is none.
    """

    text: str
    name: str
    kind: str
    files: tuple[File, ...]
    root: str = ""


def tell_all(text: str, retries: int) -> list[Source]:
    """The sources of a comma-separated list; what exists under the whole text is one.

    Raises:
        DataError: there is none, one is not there, cannot be read or is nothing that can be.
    """
    parts = [text] if os.path.exists(text) else parse_sources(text)
    if not parts:
        raise DataError(f"the source is empty; {KINDS}")
    told = [tell(part, retries) for part in parts]
    names = [source.name for source in told]
    return [replace(source, name=source.text) if names.count(source.name) > 1 else source for source in told]


def tell(text: str, retries: int) -> Source:
    """What one source is; see `tell_all`."""
    if is_folder(text, retries):
        files = listed(text, retries)
        kind, used = _of_folder(text, files)
        return Source(text, name_of(text), kind, tuple(used), files[0].url.removesuffix(files[0].name))
    files = matching(text, retries)
    kinds = [next((kind for kind, ends in KIND_OF.items() if extension(file) in ends), "") for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if not kind or kind != kinds[0]:
            raise DataError(f"the source {text} is of no kind that can be told by {file.name}; {KINDS}")
    return Source(text, name_of(text), kinds[0], tuple(files))


def _of_folder(text: str, files: Sequence[File]) -> tuple[str, Iterable[File]]:
    """The kind of a folder, and which of its files count."""
    shards = [file for file in files if _ends(file, SHARDS)]
    index = [file for file in files if file.name == INDEX]
    if index and shards:
        return "dataset", index
    if shards:
        return "shards", shards
    if any(file.name.rsplit("/", 1)[-1] in METADATA for file in files):
        return "folder", files
    tables = [file for file in files if _ends(file, TABLES)]
    if tables:
        return "table", tables
    if any(os.path.splitext(file.name)[1].lower() in EXTENSIONS for file in files):
        return "folder", files
    raise DataError(f"the folder {text} holds nothing that can be read ({len(files)} files); {KINDS}")


def extension(file: File) -> str:
    """Lower-case, with its dot; of a packed file, that of what is in it."""
    return os.path.splitext(re.sub(r"\.(gz|bz2|xz|zst)$", "", file.name.lower()))[1]


def _ends(file: File, extensions: Sequence[str]) -> bool:
    return extension(file) in extensions


def name_of(text: str) -> str:
    """Name of the set that a source is: that of the folder or file, less extensions and what a pattern leaves open."""
    parts = [part for part in text.split("/") if part]
    if parts and os.path.isdir(text):
        return parts[-1]
    names = [re.split(r"[*?\[{.]", part)[0].rstrip("-_ ") for part in reversed(parts)]
    return next((name for name in names if name), text)
