"""Packages of public registries, through the registries' own clients, cached and checked.

A finished file lies in `CACHE/downloads` beside a record of its package, version, size and sha256. A file
without a record is never used, one that no longer matches is fetched again; so an interrupted fetch goes
on with the parts that are missing. The clients check what they fetch: apt its signatures, npm the
registry's integrity hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xray.data.errors import SourceUnavailable
from xray.data.shards import folder_errors

TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Download:
    """A fetched file and its record."""

    package: str
    version: str
    file: str
    size: int
    sha256: str


def npm(package: str, version: str, cache: Path, *, progress: bool = True) -> tuple[Path, Download]:
    """The tarball of an npm package, from the cache or by `npm pack`.

    Raises:
        SourceUnavailable: there is no `npm`, or it cannot fetch the package.
    """
    found = _cached(cache, package, version)
    if found:
        return found
    client = _client("npm", package, "install Node.js")
    _tell(f"fetching {package} {version} by npm", progress)
    with _parts(cache) as folder:
        command = [client, "pack", f"{package}@{version}", "--ignore-scripts", "--pack-destination", folder]
        failure = _run(command, folder)
        if failure is not None:
            raise SourceUnavailable(
                f"{package} cannot be fetched: npm failed ({failure}); check the network and its registry"
            )
        return _keep(cache, package, version, Path(folder), "*.tgz")


def apt(package: str, cache: Path, *, progress: bool = True) -> tuple[Path, Download]:
    """A Debian package, from the cache or by `apt-get download`, in the version that this system's
    package lists offer.

    When apt has no package lists, or old ones, they are fetched into the cache; neither needs to be root.

    Raises:
        SourceUnavailable: there is no `apt-get`, or it cannot fetch the package.
    """
    found = _cached(cache, package)
    if found:
        return found
    client = _client("apt-get", package, "use a Debian or Ubuntu system that offers the package")
    _tell(f"fetching {package} by apt-get", progress)
    with _parts(cache) as folder:
        if _run([client, "download", package], folder) is not None:
            failure = _run([client, *_private_lists(cache), "update"], folder)
            if failure is None:
                failure = _run([client, *_private_lists(cache), "download", package], folder)
            if failure is not None:
                raise SourceUnavailable(
                    f"{package} cannot be fetched: apt-get failed ({failure}); check the network and sources"
                )
        return _keep(cache, package, None, Path(folder), "*.deb")


def _private_lists(cache: Path) -> list[str]:
    """Options that make apt keep package lists in the cache; it goes on verifying signatures."""
    lists, archives = cache / "apt" / "lists", cache / "apt" / "archives"
    with folder_errors(cache):
        for folder in (lists / "partial", archives / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
    options = {"Dir::State::Lists": lists, "Dir::Cache": cache / "apt", "APT::Sandbox::User": "root"}
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


def _client(name: str, package: str, remedy: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SourceUnavailable(f"{name} is not on PATH, which fetches {package}; {remedy}")
    return path


def _parts(cache: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for unfinished files, gone when done; names of finished files are never used for them."""
    with folder_errors(cache):
        (cache / "downloads").mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".part-", dir=cache / "downloads")


def _run(command: Sequence[str], folder: str) -> str | None:
    """Run a client in `folder`; None when it succeeds, else its last words."""
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT_SECONDS} seconds"
    if result.returncode == 0:
        return None
    lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("E:", "npm error", "npm ERR!"))]
    return (telling or lines or [f"exit status {result.returncode}"])[0][:200]


def _keep(cache: Path, package: str, version: str | None, folder: Path, pattern: str) -> tuple[Path, Download]:
    """Move the one finished file into the cache, then write its record: the record makes it count."""
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise SourceUnavailable(
            f"{package} cannot be fetched: its client left {len(files)} files where one was due; try again"
        )
    if version is None:  # Debian names its files package_version_architecture.deb
        version = files[0].name.split("_")[1].replace("%3a", ":")
    with folder_errors(cache):
        path = cache / "downloads" / files[0].name
        record = Download(package, version, path.name, files[0].stat().st_size, sha256_of(files[0]))
        os.replace(files[0], path)
        draft = folder / "record"
        draft.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        os.replace(draft, _record_path(path))
    return path, record


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _cached(cache: Path, package: str, version: str | None = None) -> tuple[Path, Download] | None:
    """The newest whole file of a package in the cache; what does not match its record is removed."""
    for name in sorted((cache / "downloads").glob("*.json"), reverse=True):
        try:
            record = Download(**json.loads(name.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        path = name.with_suffix("")
        if record.package != package or version not in (None, record.version) or record.file != path.name:
            continue
        if path.is_file() and path.stat().st_size == record.size and sha256_of(path) == record.sha256:
            return path, record
        _tell(f"{path} does not match its record and is fetched again", True)
        name.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return None


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tell(message: str, progress: bool) -> None:
    if progress:
        print(message, file=sys.stderr, flush=True)
