"""WordNet: names of things, their plurals and their synonyms, read from the database's own files.

The format is wndb(5WN)'s. NLTK's reader is not used: it wants files that distributions leave out (lexnames,
index.sense), a second WordNet to map to and a place on its list of trusted folders, and takes 3 s to import.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from pathlib import Path

from xray.data.errors import DataError, SourceUnavailable
from xray.data.sources import default_cache, fetch

NOUN = "1"  # in the keys of cntlist.rev
KINDS = ("noun", "verb", "adj", "adv")
FILES = (*(f"index.{kind}" for kind in KINDS), "data.noun", "noun.exc", "cntlist.rev")
# endings of plurals and of their singulars: morphy(7WN)
PLURALS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"),
)  # fmt: skip
DOMINANT = 5  # times as often as in all other senses: a word is then taken in its first sense
# a synonym is the name if text has it so often, and so many times as often: not "toad" for "frog", which WordNet
# has in one synset and met four times and twice
SYNONYM_COUNT, SYNONYM_RATIO, SYNONYM_LETTERS = 5, 2, 3
# "hearts" is a card game, too: a plural with an entry of its own is still a plural where text has its singular this
# many times as often, and never less than so often; "glasses" (10 times) and "clothes" are not
PLURAL_RATIO, PLURAL_COUNT, PLURAL_LETTERS = 20, 10, 4


class Lexicon:
    """The nouns of WordNet and how often text uses them.

    Source: G. A. Miller, "WordNet: a lexical database for English", Communications of the ACM 38 (11), 1995.

    Attributes:
        digest: sha256 of the files.
    """

    def __init__(self, folder: Path) -> None:
        """Read the database's files in `folder`.

        Raises:
            DataError: a file is missing, cannot be read or is damaged.
        """
        self.digest = _digest(folder)
        try:
            names = {kind: _index(folder / f"index.{kind}") for kind in KINDS}
            self._nouns = names["noun"]
            self._names = sorted({name for kind in names.values() for name in kind})
            self._counts = _counts(folder / "cntlist.rev")
            self._data = (folder / "data.noun").read_bytes()
            lines = (folder / "noun.exc").read_text(encoding="utf-8").splitlines()
            self._exceptions = {irregular: base for irregular, base, *_ in map(str.split, lines)}
        except (IndexError, ValueError) as error:
            raise DataError(f"{folder} holds damaged WordNet files ({error}); remove it and fetch it again") from error

    @staticmethod
    def open(setting: str, progress: bool = True) -> Lexicon | None:
        """WordNet as the setting `wordnet` asks for it.

        Args:
            setting: a folder with the files, "auto" (fetched, or found in the cache) or "off".
            progress: say on stderr what is being done.

        Returns:
            None if it is off, or cannot be fetched, which one line on stderr says.

        Raises:
            DataError: a folder without the files, or with damaged ones.
        """
        folder = _folder(setting, default_cache(), progress)
        return None if folder is None else _opened(folder, _digest(folder))

    def lemmas(self) -> list[str]:
        """The names of everything, nouns, verbs, adjectives and adverbs, in lower case, sorted."""
        return [name.replace("_", " ") for name in self._names]

    def __contains__(self, name: str) -> bool:
        """Whether a noun has this name, in lower case with spaces between words."""
        return name.replace(" ", "_") in self._nouns

    def singular(self, name: str) -> str:
        """The singular of a noun in the plural; "glasses" and "clothes" are nouns of their own, and stay.

        The last word of a phrase that is no noun itself is taken so, too: "red flowers" is "red flower".
        """
        forms = [form for form in self._singulars(name) if form in self]
        if name in self:
            return forms[0] if forms and self._is_mere_plural(name, forms[0]) else name
        if forms:
            return forms[0]
        head, space, last = name.rpartition(" ")
        return f"{head}{space}{self.singular(last)}" if space and not {"and", "or", "&"} & set(head.split()) else name

    def canonical(self, name: str) -> str:
        """The one name of what a tag names: singular, and the commonest of its synonyms.

        A synonym is taken only where there is little doubt of the sense: the word is used as a noun and in its first
        sense much more often than in all others together, that is the first sense of the synonym, too, and the synonym
        is clearly commoner.

        Args:
            name: in lower case, with single spaces between words.
        """
        single = self.singular(name)
        key = single.replace(" ", "_")
        if key not in self._nouns or len(key) < SYNONYM_LETTERS or not self._is_plain(key):
            return single
        sense = self._nouns[key][0]
        ranked = sorted((-self._count(other, sense), other) for other in self._members(sense))
        most, best = ranked[0]
        if -most < max(SYNONYM_COUNT, SYNONYM_RATIO * self._count(key, sense)):
            return single
        if best == key or self._nouns[best][0] != sense or not self._is_plain(best):
            return single
        return best.replace("_", " ")

    def _singulars(self, name: str) -> list[str]:
        if name.replace(" ", "_") in self._exceptions:
            return [self._exceptions[name.replace(" ", "_")].replace("_", " ")]
        return [name.removesuffix(plural) + ending for plural, ending in PLURALS if name.endswith(plural)]

    def _is_mere_plural(self, name: str, single: str) -> bool:
        own, singles = (self._total(word.replace(" ", "_")) for word in (name, single))
        return len(name) >= PLURAL_LETTERS and singles >= max(PLURAL_COUNT, PLURAL_RATIO * own)

    def _is_plain(self, key: str) -> bool:
        """Whether a noun's first sense is what the word commonly means."""
        senses = self._nouns[key]
        first = self._count(key, senses[0])
        others = sum(self._counts.get(key, {}).values()) - first
        return first >= DOMINANT * others if first else len(senses) == 1 and not others

    def _total(self, key: str) -> int:
        """How often the word was met as a noun."""
        return sum(count for (kind, _), count in self._counts.get(key, {}).items() if kind == NOUN)

    def _count(self, key: str, sense: int) -> int:
        """How often the word was met in this noun sense in WordNet's tagged texts."""
        senses = self._nouns.get(key, ())
        return self._counts.get(key, {}).get((NOUN, senses.index(sense) + 1), 0) if sense in senses else 0

    def _members(self, sense: int) -> list[str]:
        """The words of a synset."""
        line = self._data[sense : self._data.find(b"\n", sense)].decode("utf-8", errors="replace").split()
        if line[:1] != [f"{sense:08d}"]:
            raise DataError(f"WordNet's data.noun does not fit its index at byte {sense}; fetch the files again")
        return [word.lower() for word in line[4 : 4 + 2 * int(line[3], 16) : 2]]


def digest_of(setting: str, progress: bool = True) -> str | None:
    """Digest of the files that `Lexicon.open` would read, None where it would give None."""
    folder = _folder(setting, default_cache(), progress)
    return None if folder is None else _digest(folder)


@functools.cache
def _folder(setting: str, cache: Path, progress: bool) -> Path | None:
    """Where the files are; cached, so that all of a run's steps go with WordNet or all without."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting)
    try:
        return fetch("wordnet", cache, progress)
    except (SourceUnavailable, DataError) as error:
        print(f"going on without WordNet: {error}", file=sys.stderr, flush=True)
        return None


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, digest: str) -> Lexicon:
    return Lexicon(folder)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise DataError(
                f"wordnet is {folder}, where {name} cannot be read ({error.strerror}); "
                "a folder of WordNet's files, auto or off is needed"
            ) from error
    return digest.hexdigest()


def _index(path: Path) -> dict[str, list[int]]:
    """Places of the synsets in the data file, the commonest first, by name."""
    senses: dict[str, list[int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            words = line.split()
            senses[words[0]] = [int(place) for place in words[-int(words[2]) :]]
    return senses


def _counts(path: Path) -> dict[str, dict[tuple[str, int], int]]:
    """How often each name was met, by kind of word and number of the sense."""
    counts: dict[str, dict[tuple[str, int], int]] = {}
    for name, kind, number, count in re.findall(
        r"^(\S+)%(\d):\S* (\d+) (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE
    ):
        counts.setdefault(name, {})[(kind, int(number))] = int(count)
    return counts
