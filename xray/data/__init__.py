"""Captioned images and tagged clips: fetching, packing into shards, safe decoding, transforms, tokens,
batches.

fetch (public sets) -> pack (any folder: decode, clean, split, shards) -> Dataset -> loader -> Batch
                                               tar shards anywhere -> Stream -> stream_loader -> Batch
"""

from xray.data import transforms
from xray.data.batches import Batch, loader, sequential, skipped
from xray.data.dataset import Dataset, Sample
from xray.data.decoding import decode
from xray.data.errors import DataError, DecodeError, SourceUnavailable
from xray.data.packing import Packed, pack
from xray.data.shapes import generated
from xray.data.sources import SOURCES, default_cache, fetch
from xray.data.streams import Stream, parse_sources, stream_loader
from xray.data.tokenizer import Tokenizer, with_tags

__all__ = [
    "SOURCES",
    "Batch",
    "DataError",
    "Dataset",
    "DecodeError",
    "Packed",
    "Sample",
    "SourceUnavailable",
    "Stream",
    "Tokenizer",
    "decode",
    "default_cache",
    "fetch",
    "generated",
    "loader",
    "pack",
    "parse_sources",
    "sequential",
    "skipped",
    "stream_loader",
    "transforms",
    "with_tags",
]
