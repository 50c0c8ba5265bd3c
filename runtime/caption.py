r"""Captions cleaned as those were that the models were trained on: DeepFloyd's rules for captions from the web.

What a model learnt from is captions without addresses, tags, file names, article numbers and advertisement. A prompt
has to be cleaned in the same way, or it becomes tokens that the model has never met. The rules, and their order, are
those of `_clean_caption` of diffusers' pipelines, which are applied twice.

Two of the steps are libraries: Beautiful Soup takes HTML apart and ftfy repairs text that was decoded wrongly. Neither
changes plain English text, so they are only asked for, and needed, where a caption has other characters.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

from ..engines.errors import InvalidRequest

PLAIN = re.compile(r"[\t\n -%'-;=-~]*")  # what Beautiful Soup and ftfy leave alone: ASCII without & and <
_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d"
)


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)
SIGNS = _rules(
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK
    (rf"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # times of articles
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 10x15, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
JOINED = re.compile("[-_]")


def clean_caption(text: str) -> str:
    """A caption as the models' own text preparation leaves it.

    Raises InvalidRequest where that needs Beautiful Soup and ftfy, and they are not installed.
    """
    for _ in range(2):
        text = _clean_once(text)
    return text


def _clean_once(text: str) -> str:
    text = _apply(ADDRESSES, unquote_plus(text).strip().lower())
    text = _apply(SIGNS, _without_tags(text))
    if len(JOINED.findall(text)) > 3:  # this-is-my-cute-cat
        text = JOINED.sub(" ", text)
    text = html.unescape(html.unescape(_repaired(text)))
    return _apply(ENDS, _apply(WORDS, text)).strip()


def _apply(rules: tuple[tuple[re.Pattern[str], str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_tags(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise _missing(text, "beautifulsoup4") from error
    return str(BeautifulSoup(text, features="html.parser").text)


def _repaired(text: str) -> str:
    if PLAIN.fullmatch(text):
        return text
    try:
        import ftfy
    except ImportError as error:
        raise _missing(text, "ftfy") from error
    return str(ftfy.fix_text(text))


def _missing(text: str, library: str) -> InvalidRequest:
    return InvalidRequest(
        f"prompt {text[:40]!r}: got more than plain English letters, which this model's text preparation cleans with "
        f"{library}, which is not installed; install foresight-engines[captions], or use plain letters"
    )
