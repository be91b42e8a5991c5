"""Cleaning of captions, a column at a time: what is not language about the picture goes, every script and emoji stays.

Nearly all work is Arrow's: regular expressions of RE2, which take linear time whatever they are given. Python sees only
the captions with mojibake, entities, joiners or runs of symbols.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata

import ftfy
import ftfy.badness
import pyarrow as pa
import pyarrow.compute as pc

SPARE = 4  # characters looked at for each that is kept, as markup may take them
ENDINGS = "jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|eps|heic|heif|avif|psd|cr2|nef|mp4|m4v|mov|avi|webm|mkv|wmv"
DOMAINS = "com|net|org|info|biz|edu|gov|io|co\\.uk|de|fr|ru"
CAMERAS = "IMG|DSC[NF_]?|PICT|MVI|VID|GOPR|DJI|PXL|WP|SAM|CIMG|KIMG|PANO|P10"
UNSEEN = (
    r"[\x{AD}\x{61C}\x{180E}\x{200B}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2060}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}\p{Co}]"
)
DECORATION = r"[=*~+|\\/^<>#-]{2,}"
EDGES = r"^[\s,;:|/\\~^*=+>\x{2022}\x{B7}\x{2013}\x{2014}-]+|[\s,;:|/\\~^*=+<\x{2022}\x{B7}\x{2013}\x{2014}-]+$"
ALONE = r"^[^\pL\pN\p{So}]+$"  # punctuation; symbols and emoji may say something

# a caption without any of these needs no cleaning but Unicode's
SUSPECT = r"[^\pL\pM\pN ,.'\x{2019}-]|[ ,.'-]{2}|^[ ,.'-]|[ ,'-]$|\.[^ ]|[A-Z_][0-9]{3}"
NOT_ASCII = r"[^\x00-\x7f]"
MEND = r"[^\x00-\x7f]|&[#\pL]"
CAREFUL = r"[\x{200C}\x{200D}\x{E0000}-\x{E007F}]|[^\pL\pM\pN\s]{3}"

# where to look, what to replace there and by what, in this order; RE2's syntax
RULES: tuple[tuple[str, str, str], ...] = (
    ("<", r"(?s)<!--.*?-->|(?is)<(?:script|style)\b.*?</(?:script|style)\s*>", " "),
    ("<", r"</?[A-Za-z][^<>]{0,1000}>|</?[A-Za-z][A-Za-z0-9]*[^<>]{0,1000}$", " "),
    (r"\[", r"(?i)\[/?(?:b|i|u|url|img|quote|size|color|code)(?:=[^\[\]]{0,1000})?\]", " "),
    (r"\]\(", r"!?\[([^\[\]]{0,1000})\]\([^()\s]{0,1000}\)", r"\1"),
    (r"://|[Ww]{3}\.", r"(?i)\b(?:https?|ftp)://\S+|\bwww\.\S+", " "),
    ("@", r"[\pL\pN_.+-]{1,64}@[\pL\pN_-]{1,64}(?:\.[\pL\pN_-]{1,64})+", " "),
    (r"\.[A-Za-z]", rf"(?i)[\pL\pN_()~.-]+\.(?:{ENDINGS})([^\pL\pM\pN_]|$)", r" \1"),
    (r"[0-9]{3}", rf"(?i)(^|[^\pL\pM\pN_])(?:{CAMERAS})[_-]?[0-9]{{3,}}[\pL\pN_-]*", r"\1 "),
    (
        r"\.[A-Za-z]",
        rf"(?i)(^|[\s(])[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:{DOMAINS})(?:/\S*)?([\s).,;:!?]|$)",
        r"\1 \2",
    ),
    ("@", r"(^|[^\pL\pM\pN_@])@[\pL\pN_.]{2,30}", r"\1 "),
    ("#", r"(^|[^\pL\pM\pN_&#])#+([\pL\pN_])", r"\1\2"),
    # zero-width, direction marks and overrides, soft hyphens, annotation, private use: nothing is left in their place
    (UNSEEN, UNSEEN, ""),
    (r"[\p{Cc}\p{Z}_\x{FFFD}]", r"[\p{Cc}\p{Z}_\x{FFFD}]+", " "),
    (DECORATION, DECORATION, " "),
    (r"[(\[{\"]", r"[(\[{]\s*[)\]}]|\"\s*\"", " "),
    (r"\s[,.;]", r"\s+([,.;])", r"\1"),
    (r"\s\s", r"\s+", " "),
    (EDGES, EDGES, ""),
    (ALONE, ALONE, ""),
)

# joiners shape the letters of these scripts: Arabic to N'Ko, the Indic ones, Myanmar, Khmer, Mongolian, Balinese
_JOINED = r"\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u18af\u1a20-\u1b7f\ua840-\uabff\ufb50-\ufdff\ufe70-\ufefc"
_EMOJI = r"\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff"
JOINER = re.compile(
    rf"((?<=[{_JOINED}])[\u200c\u200d](?=[{_JOINED}])|(?<=[{_EMOJI}\ufe0f])\u200d(?=[{_EMOJI}]))|[\u200c\u200d]"
)
_FLAG = re.compile(r"(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)|[\U000e0000-\U000e007f]")  # of a region
_REPEATED = re.compile(r"([^\w\s])\1{2,}")


def clean(texts: pa.Array, longest: int) -> pa.Array:
    """Clean captions.

    Mojibake is repaired (ftfy); entities, markup, URLs, e-mail addresses, @handles, file names, hash signs before
    tags, control, zero-width and direction characters are removed, runs of symbols shortened, white space made
    single. Joiners stay inside emoji and where a script needs them. The text is Unicode NFC.

    Args:
        texts: strings; null counts as "".
        longest: characters that are kept; a longer text is cut after a word where it has any.

    Returns:
        Strings, never null, "" where nothing is left.
    """
    texts = pc.fill_null(texts.cast(pa.large_string()), "")
    texts = pc.utf8_slice_codeunits(texts, 0, SPARE * longest)
    texts = _where(texts, MEND, lambda some: _mapped(some, _mended))
    texts = _where(texts, SUSPECT, _ruled)
    texts = _where(texts, NOT_ASCII, lambda some: _mapped(some, _composed))
    return _cut(texts, longest)


def _where(texts: pa.Array, pattern: str, function) -> pa.Array:  # type: ignore[no-untyped-def]
    """Apply a function to those texts that hold the pattern."""
    mask = pc.match_substring_regex(texts, pattern)
    if not pc.any(mask).as_py():
        return texts
    return pc.replace_with_mask(texts, mask, function(texts.filter(mask)))


def _mapped(texts: pa.Array, function) -> pa.Array:  # type: ignore[no-untyped-def]
    return pa.array([function(text) for text in texts.to_pylist()], pa.large_string())


def _ruled(texts: pa.Array) -> pa.Array:
    texts = _where(texts, CAREFUL, lambda some: _mapped(some, _careful))
    for place, pattern, replacement in RULES:
        texts = _where(texts, place, functools.partial(_replaced, pattern=pattern, by=replacement))
    return texts


def _replaced(texts: pa.Array, pattern: str, by: str) -> pa.Array:
    return pc.replace_substring_regex(texts, pattern, by)


def _mended(text: str) -> str:
    if ftfy.badness.is_bad(text):
        text = ftfy.fix_encoding(text)
    return html.unescape(html.unescape(text)) if "&" in text else text  # some sites escape what is escaped


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # Arrow 25's utf8_normalize gives NFD, whatever is asked for


def _careful(text: str) -> str:
    """What needs to look at neighbours, or back."""
    text = JOINER.sub(r"\1", text)
    text = _FLAG.sub(r"\1", text)
    return _REPEATED.sub(lambda run: "..." if run[1] == "." else run[1], text)


def _cut(texts: pa.Array, longest: int) -> pa.Array:
    """Cut what is too long, after the last whole word unless that would lose more than half."""
    long = pc.greater(pc.utf8_length(texts), longest)
    if not pc.any(long).as_py():
        return texts

    def shorter(text: str) -> str:
        end = text.rfind(" ", longest // 2, longest + 1)
        return text[: end if end > 0 else longest].rstrip(" ,;:-")

    return pc.replace_with_mask(texts, long, _mapped(texts.filter(long), shorter))
