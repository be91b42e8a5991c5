"""A WordNet of a few words, in the files of the real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

LICENCE = "  1 This software and database is being provided to you ...  \n"
NOUN = "1"
# synsets: words with how often each was met; a word's first synset is its commonest sense
NOUNS: tuple[Mapping[str, int], ...] = (
    {"car": 70, "auto": 3, "automobile": 20, "motorcar": 0},
    {"cat": 18, "true_cat": 0},
    {"flower": 30},
    {"glass": 45},
    {"glasses": 5, "spectacles": 1},
    {"dog": 42, "domestic_dog": 0},
    {"frog": 2, "toad": 4},
    {"child": 148, "kid": 53},
    {"kid": 7},
    {"idea": 151, "thought": 70},
    {"thought": 32},
    {"heart": 84},
    {"hearts": 0},
    {"man": 300, "adult_male": 0},
    {"machine": 15},
    {"machine": 2, "auto": 0, "car": 0},
    {"pool": 9, "kitty": 0},
    {"kitten": 2, "kitty": 0},
    {"sunset": 10, "sundown": 1},
    {"beach": 20},
    {"hot_dog": 1},
    {"bus": 20, "autobus": 0},
    {"United_States": 9, "USA": 2},
)


def write_wordnet(folder: Path, nouns: Sequence[Mapping[str, int]] = NOUNS, verbs: Sequence[str] = ("run",)) -> Path:
    """Write the files that `Lexicon` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    data, places = LICENCE, []
    for synset in nouns:
        places.append(len(data))
        words = " ".join(f"{word} 0" for word in synset)
        data += f"{places[-1]:08d} 03 n {len(synset):02x} {words} 000 | what it means  \n"
    senses: dict[str, list[int]] = {}
    counts: list[str] = []
    for place, synset in zip(places, nouns, strict=True):
        for word, count in synset.items():
            name = word.lower()
            senses.setdefault(name, []).append(place)
            if count:
                counts.append(f"{name}%{NOUN}:03:00:: {len(senses[name])} {count}\n")
    index = [
        f"{name} n {len(at)} 1 @ {len(at)} 0 {' '.join(f'{place:08d}' for place in at)}  \n"
        for name, at in sorted(senses.items())
    ]
    files = {
        "data.noun": data,
        "index.noun": LICENCE + "".join(index),
        "index.verb": LICENCE + "".join(f"{verb} v 1 1 @ 1 0 00000100  \n" for verb in sorted(verbs)),
        "index.adj": LICENCE,
        "index.adv": LICENCE,
        "noun.exc": "men man\nfeet foot\n",
        "cntlist.rev": "".join(sorted(counts)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
