"""Captions to token ids: a byte-level BPE vocabulary learned from the training captions, by the
`tokenizers` package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xray.data.errors import DataError

if TYPE_CHECKING:
    import tokenizers

PAD, START, END = "<pad>", "<start>", "<end>"
MAX_CHARACTERS_PER_TOKEN = 32  # text beyond this many characters per wanted token is cut before the slow part


class Tokenizer:
    """Byte-level BPE over lower-cased text: every string has ids, there is no unknown token.

    A row is start, the text's tokens, end, then padding; the end token is always at `lengths - 1`, also
    when the text was cut.

    Attributes:
        vocab_size: number of ids.
        pad_id: id that fills rows up.
        start_id: id of the first token of a row.
        end_id: id of the last token of a row.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # Forked loader workers would make the Rust thread pool warn; rows this short gain nothing from it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._inner = inner
        self._inner.encode_special_tokens = True  # "<end>" in a caption is text
        self.pad_id, self.start_id, self.end_id = (_special(inner, token) for token in (PAD, START, END))
        self.vocab_size: int = inner.get_vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
        """Learn a vocabulary.

        Args:
            captions: training captions.
            vocab_size: the most ids: 3 special ones, 256 bytes, and merges while pairs occur twice.

        Raises:
            DataError: vocab_size below 259.
        """
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

        if vocab_size < 259:
            raise DataError(f"vocab_size is {vocab_size}; at least 259 is needed, 3 special tokens and 256 bytes")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        inner = Inner(models.BPE())
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, START, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((" ".join(caption.split()) for caption in captions), trainer)
        return cls(inner)

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Load a tokenizer from its JSON text, or from a file that holds it.

        Raises:
            DataError: no such file, or not a tokenizer's JSON.
        """
        from tokenizers import Tokenizer as Inner

        text, name = str(source), "the text given"
        if not text.lstrip().startswith("{"):
            name = text
            try:
                text = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{source} cannot be read as a tokenizer's JSON file ({error})") from error
        try:
            inner = Inner.from_str(text)
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{name} is not a tokenizer's JSON ({error})") from error
        return cls(inner)

    def to_json(self) -> str:
        """The whole tokenizer as JSON text, for `load`."""
        return self._inner.to_str()

    def __call__(self, captions: Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of captions.

        Args:
            captions: B texts, of any length; what does not fit is cut.
            context_length: L, at least 3.

        Returns:
            ids (B, L) int64, and lengths (B,) int64 with start and end counted.

        Raises:
            TypeError: one string instead of a sequence of strings.
            DataError: context_length below 3.
        """
        if isinstance(captions, str):
            raise TypeError("captions is one str; a sequence of str is needed, for example [caption]")
        if context_length < 3:
            raise DataError(f"context_length is {context_length}; at least 3 is needed: start, one token, end")
        limit = context_length * MAX_CHARACTERS_PER_TOKEN
        texts = [" ".join(caption[: 2 * limit].split())[:limit] for caption in captions]
        ids = torch.full((len(texts), context_length), self.pad_id, dtype=torch.int64)
        lengths = torch.empty(len(texts), dtype=torch.int64)
        for row, encoding in enumerate(self._inner.encode_batch(texts, add_special_tokens=False)):
            tokens = [self.start_id, *encoding.ids[: context_length - 2], self.end_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            lengths[row] = len(tokens)
        return ids, lengths

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The text of one row of ids, without special tokens."""
        values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self._inner.decode(values, skip_special_tokens=True).strip()


def with_tags(pairs: Iterable[tuple[str, Sequence[str]]], most: int) -> list[str]:
    """Captions, each with up to `most` of its tags that it does not say already: "red heart, love, card"."""
    texts = []
    for caption, tags in pairs:
        spoken = caption.casefold()
        unspoken = [tag for tag in tags if tag.casefold() not in spoken]
        texts.append(", ".join(part for part in [caption, *unspoken[:most]] if part))
    return texts


def _special(inner: tokenizers.Tokenizer, token: str) -> int:
    number = inner.token_to_id(token)
    if number is None:
        raise DataError(f"the tokenizer lacks the token {token}; make it with Tokenizer.train")
    return number
