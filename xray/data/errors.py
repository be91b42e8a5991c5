"""The errors of the data package: each message is one sentence that says what came and what is needed."""

from __future__ import annotations


class DataError(ValueError):
    """A folder, file or argument that the data package cannot use."""


class DecodeError(DataError):
    """A media file that cannot be decoded, or that is refused before decoding; callers count it and go on."""


class SourceUnavailable(RuntimeError):
    """A public set that cannot be fetched here: a client or a registry is missing; callers go on
    without it.
    """
