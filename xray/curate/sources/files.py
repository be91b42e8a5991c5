"""Files of a source, on this machine or behind any protocol that fsspec knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from xray.curate.files import tried
from xray.data.errors import DataError
from xray.data.shard_files import FINAL

STAMPS = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "created")
ABSENT = "absent"
THREADS = 16
FIRST_PAUSE = 0.25  # seconds before the second attempt; twice as long before each further one
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    Attributes:
        url: an absolute path, or an address.
        name: relative to the source's folder, with forward slashes.
        size: in bytes; -1 if the file system does not say.
        stamp: of its last change, in whatever way the file system tells it.
    """

    url: str
    name: str
    size: int
    stamp: str

    @property
    def folder(self) -> str:
        """Address of the folder that holds it, with a slash behind it."""
        return self.url[: self.url.rfind("/") + 1]

    @property
    def below(self) -> str:
        """The same, relative to the source's folder; "" for that itself."""
        return self.name[: self.name.rfind("/") + 1]


def is_remote(url: str) -> bool:
    """Whether it is an address and not a path."""
    return "://" in url


def attempt(action: Callable[[], T], what: str, retries: int) -> T:
    """What `action` returns, tried again after growing pauses.

    Raises:
        DataError: it failed each time; errors that another attempt cannot mend are not tried again.
    """
    try:
        return tried(action, retries, FIRST_PAUSE, (DataError, *FINAL))
    except DataError:
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} cannot be read ({words[:300]})") from error


def opened(url: str, retries: int = 0, **options: Any) -> IO[Any]:
    """Open a file as text or bytes, packed ones (.gz, .bz2, .zst ...) unpacked on the way."""
    import fsspec

    options = {"compression": "infer", **options}
    return attempt(lambda: fsspec.open(url, **options).open(), url, retries)


def is_folder(text: str, retries: int) -> bool:
    """Whether a path or address is a folder; a pattern is none.

    Raises:
        DataError: the address cannot be asked.
    """
    if not is_remote(text):
        return os.path.isdir(text)
    import fsspec

    def ask() -> bool:
        file_system, path = fsspec.url_to_fs(text)
        try:
            return bool(file_system.info(path)["type"] == "directory")  # isdir takes a fault of the network for no
        except FileNotFoundError:
            return False

    return not is_pattern(text) and attempt(ask, text, retries)


def listed(folder: str, retries: int) -> list[File]:
    """All files below a folder, by name; hidden ones are left out.

    Raises:
        DataError: it cannot be listed.
    """
    return attempt(lambda: sorted(_walk(folder), key=lambda file: file.name), folder, retries)


def matching(pattern: str, retries: int) -> list[File]:
    """The files of a path, or of a pattern with stars or braces, in order. What braces name need not be there: its
    `stamp` is `ABSENT` then.

    Raises:
        DataError: it cannot be listed, or nothing is there.
    """
    import braceexpand

    exact = not is_pattern(pattern) or (not is_remote(pattern) and os.path.exists(pattern))
    parts = [pattern] if exact else list(braceexpand.braceexpand(pattern))
    with ThreadPoolExecutor(THREADS) as pool:
        found = [file for files in pool.map(lambda part: _matching(part, exact, retries), parts) for file in files]
    if all(file.stamp == ABSENT for file in found):
        raise DataError(f"{pattern} cannot be read (no such file)")
    return found


def is_pattern(text: str) -> bool:
    """Whether it has stars or braces."""
    return any(sign in text for sign in "*?[{")


def _matching(part: str, exact: bool, retries: int) -> list[File]:
    import fsspec

    def find() -> list[File]:
        file_system, path = fsspec.url_to_fs(part)
        if exact or not is_pattern(part):
            try:
                return [_file(part, file_system, file_system.info(path))]
            except FileNotFoundError:
                return [File(part if is_remote(part) else path, part.rsplit("/", 1)[-1], -1, ABSENT)]
        return [_file(part, file_system, file_system.info(path)) for path in sorted(file_system.glob(path))]

    return attempt(find, part, retries)


def _file(given: str, file_system: Any, info: dict[str, Any]) -> File:
    path = str(info["name"])
    url = file_system.unstrip_protocol(path) if is_remote(given) and not is_remote(path) else path
    return File(url, path.rsplit("/", 1)[-1], int(info.get("size") or 0), _stamp(info))


def _stamp(info: dict[str, Any]) -> str:
    return str(next((info[name] for name in STAMPS if info.get(name) is not None), ""))


def _walk(folder: str) -> Iterator[File]:
    if is_remote(folder):
        yield from _walk_remote(folder)
        return
    root = os.path.abspath(folder)
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                elif entry.is_file():
                    about = entry.stat()
                    yield File(entry.path, name, about.st_size, str(about.st_mtime_ns))


def _walk_remote(folder: str) -> Iterator[File]:
    import fsspec

    file_system, root = fsspec.url_to_fs(folder)
    for path, info in file_system.find(root, detail=True).items():
        name = path[len(root.rstrip("/")) :].lstrip("/")
        if not any(part.startswith(".") for part in name.split("/")):
            yield File(file_system.unstrip_protocol(path), name, int(info.get("size") or 0), _stamp(info))
