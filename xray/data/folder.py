"""Folders of images and clips as people keep them: the Hugging Face image-folder convention.

A `metadata.csv` or `metadata.jsonl`, in the folder or in folders below it, names files relative to itself.
Files that no metadata names take their caption from a text file of the same stem, `cat.jpg` from `cat.txt`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from xray.data.errors import DataError

METADATA = ("metadata.csv", "metadata.jsonl")
EXTENSIONS = frozenset(
    f".{name}" for names in ("png jpg jpeg gif webp bmp tif tiff", "mp4 m4v mov webm mkv avi") for name in names.split()
)


@dataclass(frozen=True)
class Record:
    """One media file of a folder and what is known of it.

    Attributes:
        id: unique, "source:file_name".
        path: the file.
        caption: may be empty.
        tags: clean tags, see `clean_tags`.
        label: category, "" if none.
        identity: what the file shows, for the split; "" to go by looks.
        source: the set's name.
    """

    id: str
    path: Path
    caption: str = ""
    tags: list[str] = field(default_factory=list)
    label: str = ""
    identity: str = ""
    source: str = ""


@dataclass(frozen=True)
class FolderContents:
    """The records of a folder, in order, and (id, reason) of what cannot be one."""

    records: list[Record]
    unusable: list[tuple[str, str]]


def read_folder(folder: str | Path) -> FolderContents:
    """Find the media files of a folder and their captions, tags, labels.

    Metadata columns: `file_name`; `caption` or `text`; `tags`, separated by ";" or a JSON list; and, all
    optional, `label`, `identity` (files with the same one never straddle train and test) and `source`.

    Raises:
        DataError: no such folder, nothing in it, a file that cannot be read, no `file_name` column, a file
            named twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; a folder of images or clips is needed")
    try:
        names = sorted(_walk(folder))
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    records: list[Record] = []
    unusable: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    present = set(names)
    for name in names:
        path = PurePosixPath(name)
        if path.name in METADATA:
            for line, row in _rows(folder / name, unusable, f"{folder.name}:{name}"):
                _add_row(folder, path.parent, line, row, present, seen, records, unusable, name)
    for name in names:
        if name not in seen and PurePosixPath(name).suffix.lower() in EXTENSIONS:
            records.append(_sidecar(folder, name, present))
    if not records and not unusable:
        raise DataError(f"{folder} holds no images or clips; put some there, with metadata.csv or .txt captions")
    return FolderContents(records, unusable)


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write `folder/metadata.jsonl`, so that `read_folder` finds what a converter knows."""
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def clean_tags(tags: Any) -> list[str]:
    """Tags from a list or a string separated by ";": lower case, no leading "#", underscores as
    spaces, each once.

    Raises:
        DataError: neither a list of strings nor a string.
    """
    if tags is None:
        return []
    if isinstance(tags, str):
        text = tags.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                tags = json.loads(text)
            except json.JSONDecodeError:
                tags = text.split(";")
        else:
            tags = text.split(";")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"tags are {str(tags)[:80]!r}; a list of strings or one string with ';' between tags is needed")
    cleaned = (" ".join(tag.replace("_", " ").lower().split()).lstrip("# ") for tag in tags)
    return list(dict.fromkeys(tag for tag in cleaned if tag))


def _walk(folder: Path) -> Iterator[str]:
    """Files below the folder, as relative names with forward slashes; hidden ones are left out."""

    def fail(error: OSError) -> None:
        raise error

    for base, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield Path(base, name).relative_to(folder).as_posix()


def _rows(path: Path, unusable: list[tuple[str, str]], name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, columns) of a metadata file."""
    try:
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            if path.suffix == ".csv":
                rows = csv.DictReader(file)
                if "file_name" not in (rows.fieldnames or []):
                    raise DataError(f"{path} has no column file_name; its first line must name the columns")
                for row in rows:
                    yield rows.line_num, row
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    columns = json.loads(line)
                except json.JSONDecodeError:
                    columns = None
                if isinstance(columns, dict) and isinstance(columns.get("file_name"), str):
                    yield number, columns
                else:
                    unusable.append((f"{name}:{number}", "the line is no JSON object with a file_name"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); UTF-8 text is needed") from error


def _add_row(
    folder: Path,
    parent: PurePosixPath,
    line: int,
    row: Mapping[str, Any],
    present: set[str],
    seen: dict[str, str],
    records: list[Record],
    unusable: list[tuple[str, str]],
    metadata: str,
) -> None:
    """Turn one metadata row into a record, or a line among the unusable."""
    given = str(row["file_name"] or "")
    source = str(row.get("source") or folder.name)
    id, where = f"{source}:{parent / given}", f"{metadata} line {line}"
    path = PurePosixPath(given)
    if path.is_absolute() or ".." in path.parts:
        unusable.append((id, f"{where} names a file outside the folder"))
        return
    name = (parent / path).as_posix()
    if name in seen:
        raise DataError(
            f"{folder / metadata} names {given} in line {line}, and {seen[name]} did so; name each file once"
        )
    seen[name] = where
    if name not in present:
        unusable.append((id, f"{where} names a file that is not there"))
        return
    try:
        tags = clean_tags(row.get("tags"))
    except DataError as error:
        unusable.append((id, f"{where}: {error}"))
        return
    caption = " ".join(str(row.get("caption") or row.get("text") or "").split())
    label, identity = (str(row.get(key) if row.get(key) is not None else "") for key in ("label", "identity"))
    records.append(Record(id, folder / name, caption, tags, label, identity, source))


def _sidecar(folder: Path, name: str, present: set[str]) -> Record:
    """A file that no metadata names: its caption is in a text file beside it, if at all."""
    text = PurePosixPath(name).with_suffix(".txt").as_posix()
    caption = ""
    if text in present:
        caption = " ".join((folder / text).read_text(encoding="utf-8", errors="replace").split())
    return Record(f"{folder.name}:{name}", folder / name, caption, source=folder.name)
