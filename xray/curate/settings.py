"""What `xray curate` can be told, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xray.data.decoding import MAX_PIXELS
from xray.data.errors import DataError
from xray.data.shards import JPEG_SIDE, SHARD_BYTES


@dataclass(frozen=True)
class Settings:
    """The settings of a curation; every default is meant to be right for a set of some thousand pairs or more.

    Attributes:
        seed: of balancing and of the split.
        engine: "native" (this machine) or "ray" (a cluster).
        address: of the Ray cluster; "" takes $RAY_ADDRESS, else starts one on this machine.
        num_workers: processes that decode, on all machines together; None takes one per core.
        progress: say on stderr what is being done.

        columns: names of the source's columns where they are not the usual ones: "caption=text,url=link".
        retries: further attempts to read a file or URL that fails.

        max_side: longer side of what is stored, in pixels; smaller pictures keep their size.
        max_frames: frames kept of a clip, evenly spread.
        max_pixels: files with larger frames are dropped before they are decoded.

        languages: captions in other languages are dropped: "en,de"; "" keeps all and does not look.
        max_caption: characters of a caption that are kept.
        boilerplate_count: a caption carried by more samples than this ...
        boilerplate_share: ... and by more than this share of them says nothing about any.
        wordnet: folder of WordNet's files, "auto" (fetched if it can be), "off".
        stop_count: a tag carried by fewer samples than this is never found to be noise.

        near_bits: perceptual hashes that differ in at most this many of 64 bits look alike; at most 3.
        text_similarity: captions at least this alike (Jaccard of word triples) are duplicates; 0 is off.
        text_words: shorter captions are never duplicates by text.
        against: evaluation sets, comma-separated datasets, folders of images, tables: what resembles them is dropped.

        checkpoint: a trained CLIP model; "" leaves the agreement of image and text unchecked.
        agreement: share of the pairs, those that agree least, that is dropped.

        metadata: the user's own list of entries, a text file with one a line; "" builds one.
        balance: "captions", "tags", "both" or "none".
        threshold: MetaCLIP's t, the number of pairs an entry keeps; 0 finds it by `tail_share`, 20 at least.
        tail_share: share of all matches that entries rarer than t hold.
        tag_threshold: tags on a smaller share of the samples than this are replicated; 0 takes their median's.
        max_copies: of one sample.

        test_share: of identities.
        shard_bytes: size at which a shard is closed.
    """

    seed: int = 0
    engine: str = "native"
    address: str = ""
    num_workers: int | None = None
    progress: bool = True

    columns: str = ""
    retries: int = 2

    max_side: int = 256
    max_frames: int = 16
    max_pixels: int = MAX_PIXELS

    languages: str = ""
    max_caption: int = 2000
    boilerplate_count: int = 10
    boilerplate_share: float = 0.0002
    wordnet: str = "auto"
    stop_count: int = 20

    near_bits: int = 3
    text_similarity: float = 0.8
    text_words: int = 8
    against: str = ""

    checkpoint: str = ""
    agreement: float = 0.1

    metadata: str = ""
    balance: str = "both"
    threshold: int = 0
    tail_share: float = 0.06
    tag_threshold: float = 0.0
    max_copies: int = 10

    test_share: float = 0.1
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{name} is {value}; a value from {low} to {high} is needed")
        if self.max_side * self.max_frames > JPEG_SIDE:
            raise DataError(
                f"max_side x max_frames is {self.max_side} x {self.max_frames}; at most {JPEG_SIDE} is needed"
            )
        if self.balance not in BALANCE:
            raise DataError(f"balance is {self.balance!r}; one of {', '.join(BALANCE)} is needed")

    def only(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Some settings, as JSON takes them."""
        return {name: getattr(self, name) for name in names}


BALANCE = ("captions", "tags", "both", "none")
MANY = 10**12
RANGES: tuple[tuple[str, float, float], ...] = (
    ("num_workers", 0, 4096),
    ("retries", 0, 100),
    ("max_side", 8, JPEG_SIDE),
    ("max_frames", 1, JPEG_SIDE),
    ("max_pixels", 1, MANY),
    ("max_caption", 1, MANY),
    ("boilerplate_count", 1, MANY),
    ("boilerplate_share", 0, 1),
    ("stop_count", 1, MANY),
    ("near_bits", 0, 3),
    ("text_similarity", 0, 1),
    ("text_words", 3, MANY),
    ("agreement", 0, 1),
    ("threshold", 0, MANY),
    ("tail_share", 0, 1),
    ("tag_threshold", 0, 1),
    ("max_copies", 1, 1000),
    ("test_share", 0, 1),
    ("shard_bytes", 1, MANY),
)
