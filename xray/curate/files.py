"""The bytes of media files, wherever they are: local paths, HTTP, any file system that fsspec knows."""

from __future__ import annotations

import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from xray.data.shard_files import FINAL

MAX_BYTES = 2**29  # of one file; larger ones are no pictures, and clips are to be cut
CONNECTIONS = 16  # files that one process waits for at a time
TIMEOUT = 30.0  # seconds without a byte ...
DEADLINE = 120.0  # ... and for a whole file
FIRST_PAUSE = 0.5  # seconds before the second attempt; twice as long before each further one
BLOCK = 2**20
LOCAL = (None, "file")
WORTH_RETRYING = (408, 425, 429)  # of the answers that blame the asker


T = TypeVar("T")


class Unavailable(Exception):
    """A file that cannot be had; another attempt gives the same."""


@dataclass(frozen=True)
class Place:
    """Where a file's bytes are.

    Attributes:
        url: a path or address.
        offset: of the first byte, None for the whole file.
        size: in bytes, None for all from `offset` on.
    """

    url: str
    offset: int | None = None
    size: int | None = None

    @property
    def remote(self) -> bool:
        """Whether waiting for it costs more than reading it."""
        return "://" in self.url and not self.url.startswith("file://")


def fetch_all(places: Sequence[Place | None], retries: int) -> list[bytes | str]:
    """The bytes of each place, or why they cannot be had; None gives no bytes.

    Args:
        places: local ones are read one after the other, others side by side.
        retries: further attempts at a file that fails, after growing waits.
    """
    if not any(place and place.remote for place in places):
        return [_attempt(place, retries) for place in places]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda place: _attempt(place, retries), places))


def _attempt(place: Place | None, retries: int) -> bytes | str:
    if place is None:
        return b""
    try:
        return tried(lambda: _fetch(place), retries, FIRST_PAUSE, (Unavailable, *FINAL))
    except Exception as error:
        return _in_words(error)


def tried(action: Callable[[], T], retries: int, pause: float, final: tuple[type[Exception], ...]) -> T:
    """What `action` returns, tried again while it fails.

    Args:
        action: what may fail for a moment.
        retries: further attempts.
        pause: seconds before the second attempt; twice as long before each further one.
        final: errors that another attempt cannot mend.

    Raises:
        Exception: what the last attempt raised, or a final error.
    """
    for number in range(retries):
        try:
            return action()
        except final:
            raise
        except Exception:  # each file system has errors of its own
            time.sleep(pause * 2**number)
    return action()


def _fetch(place: Place) -> bytes:
    if place.size is not None and place.size > MAX_BYTES:
        raise Unavailable(f"{place.size} bytes are above the cap of {MAX_BYTES}")
    if place.url.startswith(("http://", "https://")):
        data = _from_http(place)
    elif place.remote or place.url.startswith("file://"):
        data = _from_file_system(place)
    else:
        data = _from_disk(place)
    if place.size is not None and len(data) < place.size:
        raise Unavailable(f"it is cut off: {len(data)} of {place.size} bytes are there")
    return data


def _from_disk(place: Place) -> bytes:
    facts = os.stat(place.url)
    if not stat.S_ISREG(facts.st_mode):
        raise Unavailable("it is no regular file")
    if place.offset is None and facts.st_size > MAX_BYTES:
        raise Unavailable(f"{facts.st_size} bytes are above the cap of {MAX_BYTES}")
    with open(place.url, "rb") as file:
        file.seek(place.offset or 0)
        return file.read(MAX_BYTES if place.size is None else place.size)


def _from_file_system(place: Place) -> bytes:
    import fsspec

    file_system, path = fsspec.url_to_fs(place.url)
    start = place.offset or 0
    with file_system.open(path, "rb") as file:
        file.seek(start)
        data = file.read(MAX_BYTES + 1 if place.size is None else place.size)
    return _checked(data)


def _from_http(place: Place) -> bytes:
    """One GET, without fsspec, whose HTTP asks twice and has no bound on what comes."""
    headers = {"User-Agent": "xray"}
    start, wanted = place.offset or 0, MAX_BYTES + 1 if place.size is None else place.size
    if place.offset is not None:
        end = "" if place.size is None else str(start + place.size - 1)
        headers["Range"] = f"bytes={start}-{end}"
    request = urllib.request.Request(place.url, headers=headers)
    deadline = time.monotonic() + DEADLINE
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            skipped = 0 if answer.status == 206 else start  # a server without ranges sends all
            parts: list[bytes] = []
            due = skipped + wanted
            while due > 0 and (block := answer.read(min(due, BLOCK))):
                due -= len(block)
                parts.append(block[skipped:])
                skipped = max(0, skipped - len(block))
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it is not there after {DEADLINE:g} seconds")
            if due > 0 and answer.length:
                raise ConnectionError(f"it is cut off: {answer.length} bytes more were promised")
    except urllib.error.HTTPError as error:
        if 400 <= error.code < 500 and error.code not in WORTH_RETRYING:
            raise Unavailable(f"HTTP {error.code} {error.reason}") from error
        raise
    return _checked(b"".join(parts))


def _checked(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise Unavailable(f"it is above the cap of {MAX_BYTES} bytes")
    return data


def _in_words(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    strerror = getattr(reason, "strerror", None)
    return " ".join(str(strerror or reason).split()) or type(error).__name__
