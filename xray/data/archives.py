"""Reading archives that strangers made: only plain files come out, and only inside the folder meant
for them.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from xray.data.errors import DataError, SourceUnavailable

MAX_MEMBER_BYTES = 2**30


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar file, compressed or not, for reading once from front to back.

    Raises:
        DataError: the file cannot be read as a tar archive, or is damaged or cut off.
    """
    try:
        with tarfile.open(path, "r|*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path} is no whole tar archive ({error}); remove it and fetch it again") from error


@contextmanager
def open_deb(path: Path) -> Iterator[tarfile.TarFile]:
    """Open the files of a Debian package as a tar stream, by `dpkg-deb`.

    Raises:
        SourceUnavailable: there is no `dpkg-deb`.
        DataError: the package is damaged.
    """
    if shutil.which("dpkg-deb") is None:
        raise SourceUnavailable(f"dpkg-deb is not on PATH, which unpacks {path.name}; install dpkg")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield tar
            while process.stdout is not None and process.stdout.read(2**20):
                pass  # padding after the archive's end, so that dpkg-deb is not cut off
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{path} is no whole Debian package; remove it and fetch it again") from error
        finally:
            if process.stdout is not None:
                process.stdout.close()
    if process.returncode != 0:
        raise DataError(f"{path} is no whole Debian package; remove it and fetch it again")


def files(tar: tarfile.TarFile, refused: list[str] | None = None) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The plain files of an archive: their path, relative and without "..", and their bytes.

    Links, devices, absolute paths and paths that climb out are not followed or created; their names go to
    `refused`.
    """
    for member in tar:
        if member.isdir():
            continue
        path = _inside(member)
        reader = tar.extractfile(member) if path is not None else None
        if path is None or reader is None:
            if refused is not None:
                refused.append(member.name)
            continue
        yield path, reader.read()


def _inside(member: tarfile.TarInfo) -> PurePosixPath | None:
    """The member's path if it is a plain file that stays inside the folder it is unpacked to."""
    name = member.name
    path = PurePosixPath(name)
    safe = (
        member.isreg()
        and member.size <= MAX_MEMBER_BYTES
        and not path.is_absolute()
        and ".." not in path.parts
        and path.parts != ()
        and "\\" not in name
        and all(character.isprintable() for character in name)
    )
    return path if safe else None


def unpack(tar: tarfile.TarFile, folder: Path, place: Callable[[PurePosixPath], PurePosixPath | None]) -> list[str]:
    """Write an archive's plain files below `folder`, which must be new or empty and not shared with others.

    Args:
        tar: an open archive.
        folder: where to write.
        place: from a member's path to its path below `folder`, or None to leave it out.

    Returns:
        Names of members that were refused: links, devices, paths that lead outside.
    """
    refused: list[str] = []
    root = folder.resolve()
    for path, data in files(tar, refused):
        relative = place(path)
        if relative is None:
            continue
        target = root / relative
        if not target.resolve().is_relative_to(root):
            refused.append(str(path))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as file:
            file.write(data)
    return refused
