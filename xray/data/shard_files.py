"""Tar shards read from front to back, from any file system that fsspec knows, in bounded time.

A thread of its own reads each shard ahead in large blocks, so no read waits longer than a time limit, and
reading overlaps with decoding. The bytes of a member are copied once, out of those blocks.

Members are grouped by WebDataset's convention: the key is the path up to the first dot of its last part,
the rest is the extension, and the members of one key stand next to each other.
"""

from __future__ import annotations

import contextlib
import queue
import re
import tarfile
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from xray.data.errors import DataError

BLOCK = 2**20  # bytes a thread reads at a time
BLOCKS_AHEAD = 2
ATTEMPTS = 4
FIRST_PAUSE = 0.25  # seconds before the second attempt; twice as long before each further one
MAX_MEMBER = 2**29  # bytes; a header that claims more is taken for damage
# Another attempt gives the same answer.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)

T = TypeVar("T")

_MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes within a shard


class ShardError(DataError):
    """A shard that cannot be read on: missing, cut off, damaged or stalled. The reader goes to its next one."""


@dataclass(slots=True)
class Group:
    """The members of one key.

    Attributes:
        key: their common name.
        offset: of the first member's header in the shard, in bytes.
        end: where the next group's header is.
        members: lower-case extension -> bytes; b"" for an extension that was not asked for.
        places: lower-case extension -> where its bytes are in the shard, and how many.
    """

    key: str
    offset: int
    end: int = 0
    members: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


class ShardFile:
    """The bytes of a shard from `start` on, forward only, each read in bounded time.

    Args:
        url: a local path, or an address of any fsspec protocol.
        start: the first byte.
        timeout: seconds without a byte after which a read fails.
        attempts: at opening and reading it, without any progress between them.
    """

    def __init__(self, url: str, start: int, timeout: float, attempts: int = ATTEMPTS) -> None:
        self._timeout = timeout
        self._position = start
        self._block, self._used = b"", 0
        self._ended = False
        self.last = b""  # what the last read gave
        self._blocks: queue.Queue[bytes | Exception] = queue.Queue(BLOCKS_AHEAD)
        self._closed = threading.Event()
        # The thread holds no reference to this object, so an abandoned one ends the thread.
        arguments = (url, start, attempts, self._blocks, self._closed)
        threading.Thread(target=_read_ahead, args=arguments, name=f"reading {url}", daemon=True).start()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file.

        Raises:
            ShardError: the file cannot be opened or read, no byte came in time, or the size is no member's.
        """
        if not 0 <= size <= MAX_MEMBER:
            raise ShardError(f"it is damaged: a header at byte {self._position} claims {size} bytes")
        if self._used + size <= len(self._block):
            self.last = self._block[self._used : self._used + size]
            self._used += size
        else:
            self.last = b"".join(self._pieces(size))
        self._position += len(self.last)
        return self.last

    def seek(self, position: int) -> None:
        """Go forward to `position`; the end of the file stops it."""
        if position < self._position:
            raise ShardError(f"a header points back from byte {self._position} to {position}")
        for piece in self._pieces(position - self._position):
            self._position += len(piece)

    def tell(self) -> int:
        """The place of the next byte in the shard."""
        return self._position

    def close(self) -> None:
        """End the reading thread; one that hangs in the file system ends when that lets it go."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):  # room for a block that the thread may be waiting to hand over
            while True:
                self._blocks.get_nowait()

    def __del__(self) -> None:
        self.close()

    def _pieces(self, size: int) -> Iterator[memoryview]:
        """Views of the next `size` bytes, fewer at the end."""
        while size > 0:
            if self._used == len(self._block):
                if not self._ended:
                    self._block, self._used = self._next_block(), 0
                    self._ended = not self._block
                if self._ended:
                    return
            piece = memoryview(self._block)[self._used : self._used + size]
            self._used += len(piece)
            size -= len(piece)
            yield piece

    def _next_block(self) -> bytes:
        try:
            block = self._blocks.get(timeout=self._timeout)
        except queue.Empty:
            raise ShardError(f"the reader stalled: no byte came for {self._timeout:g} seconds") from None
        if isinstance(block, Exception):
            raise ShardError(f"it cannot be read: {_in_words(block)}") from block
        return block


def groups(file: ShardFile, extensions: Container[str]) -> Iterator[Group]:
    """The groups of a shard, from where `file` stands, which is at a header.

    A group is given once its end is seen, so of a shard that is cut off every whole group comes first.

    Args:
        file: the shard.
        extensions: lower-case extensions of the members to read; others are passed over.

    Raises:
        ShardError: the shard cannot be read on.
    """
    tar: Any = _parsed(lambda: tarfile.TarFile(fileobj=cast(Any, file), errors="replace"))
    # A TarFile that found no first member is at its end, and must not be asked for more.
    member = _parsed(tar.next) if tar.firstmember is not None else None
    group: Group | None = None
    while member is not None:
        tar.members.clear()
        name = _MEMBER_NAME.fullmatch(member.name)
        if name is not None and member.isreg() and not _METADATA.match(member.name):
            key, extension = name[1], name[2].lower()
            if group is not None and (key != group.key or extension in group.members):
                group.end = member.offset
                yield group
                group = None
            group = group or Group(key, member.offset)
            group.places[extension] = (member.offset_data, member.size)
            if extension in extensions:
                file.seek(member.offset_data)
                group.members[extension] = file.read(member.size)  # if it is cut off, the next header is missed
            else:
                group.members[extension] = b""
        file.seek(tar.offset)
        member = _parsed(tar.next)
    if file.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes damage for the end
        raise ShardError(f"it is cut off or damaged at byte {file.tell() - len(file.last)}")
    if group is not None:
        group.end = tar.offset
        yield group


def _parsed(parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ShardError:
        raise
    except Exception as error:  # hostile headers make tarfile raise more than its own errors
        raise ShardError(f"it is no tar archive, cut off or damaged: {_in_words(error)}") from error


def _read_ahead(
    url: str, start: int, attempts: int, blocks: queue.Queue[bytes | Exception], closed: threading.Event
) -> None:
    """Put the file's blocks into `blocks`, b"" at the end, or the error that ends it; errors of the moment are
    tried again from the byte they came at.
    """
    import fsspec

    position, attempt = start, 0
    while not closed.is_set():
        try:
            file_system, path = fsspec.url_to_fs(url)
            with file_system.open(path, "rb") as file:
                _go_to(file, position)
                while not closed.is_set():
                    block = file.read(BLOCK)
                    blocks.put(block)
                    if not block:
                        return
                    position, attempt = position + len(block), 0
        except Exception as error:  # each file system has errors of its own
            attempt += 1
            if isinstance(error, FINAL) or attempt == attempts:
                blocks.put(error)
                return
            closed.wait(FIRST_PAUSE * 2 ** (attempt - 1))


def _go_to(file: Any, position: int) -> None:
    try:
        file.seek(position)
    except (OSError, ValueError):  # a stream without ranges: read up to there
        while position > 0 and (block := file.read(min(position, BLOCK))):
            position -= len(block)


def _in_words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
