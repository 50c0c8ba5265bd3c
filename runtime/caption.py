r"""Captions cleaned as those were that the models were trained on: DeepFloyd's rules for captions from the web.

What a model learnt from is captions without addresses, tags, file names, article numbers and advertisement. A prompt
has to be cleaned in the same way, or it becomes tokens that the model has never met. The rules, and their order, are
those of `_clean_caption` of diffusers' pipelines, which are applied twice.

Two of the steps are libraries: Beautiful Soup takes HTML apart and ftfy repairs text that was decoded wrongly. Neither
changes plain English text, so they are only asked for, and needed, where a caption has other characters. Models that
learnt from captions as they are have none of these rules; for them text is only repaired.

A caption may come from anyone, so each rule takes time in proportion to its length. Where theirs begins anew at every
character of a run that it has already searched in vain, ours enters each run once, and finds the same.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from io import StringIO
from urllib.parse import unquote_plus

from ..engines.errors import InvalidRequest, one_line, quoted
from .admission import CancelToken, check_cancelled

PLAIN = re.compile(r"[\t\n -%'-;=-~]*")  # what Beautiful Soup and ftfy leave alone: ASCII without & and <
_RUN = r"[a-zA-Z0-9.\-]"
_DOMAIN = rf"{_RUN}+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d"
)


def _address(scheme: str) -> tuple[str, str]:
    """Addresses with a scheme, and domains. A run of letters in which no domain ends is kept whole, up to a scheme."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})|\b((?:(?!\b{scheme}:){_RUN})+)", r"\1"


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


ADDRESSES = _rules(
    ("<person>", "person"),
    _address("https?"),
    _address("www"),
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
    (rf"(?<!\S)\S+\.(?:{_FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
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
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # sizes: 10x15, with a Latin or a Cyrillic x
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
TAG = re.compile("<[a-z]", re.IGNORECASE)
MOST_TAGS = 64  # Python's parser reads on to the end of the text at every tag that nothing closes


def clean_caption(text: str, cancel: CancelToken | None = None) -> str:
    """A caption as the models' own text preparation leaves it. `cancel` is looked at before each of its two passes.

    Raises InvalidRequest where that needs Beautiful Soup and ftfy and they are not installed, or cannot read it, and
    where there are more tags than MOST_TAGS.
    """
    for _ in range(2):
        check_cancelled(cancel, "while its text was prepared")
        text = _clean_once(text)
    return text


def clean_whitespace(text: str) -> str:
    """Text as it was meant: decoded rightly, without HTML's names of characters, with single blanks alone.

    It is `prompt_clean` of the pipelines in diffusers that have no rules for captions, where ftfy is installed. Raises
    InvalidRequest where ftfy is needed and not installed, or cannot read the text.
    """
    return " ".join(_with_library("HTML entities", _unescape, _repaired(text)).split())


def _clean_once(text: str) -> str:
    text = _apply(ADDRESSES, unquote_plus(text).strip().lower())
    text = _apply(SIGNS, _without_tags(text))
    if len(JOINED.findall(text)) > 3:  # this-is-my-cute-cat
        text = JOINED.sub(" ", text)
    text = _with_library("HTML entities", _unescape, _repaired(text))
    return _apply(ENDS, _apply(WORDS, text)).strip()


def _apply(rules: tuple[tuple[re.Pattern[str], str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_tags(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    if (tags := len(TAG.findall(text))) > MOST_TAGS:
        raise InvalidRequest(
            f"prompt {quoted(text)}: got {tags} HTML tags, expected at most {MOST_TAGS}; say in words what it shows"
        )
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise _missing(text, "beautifulsoup4") from error
    # As a file: of a string that looks like an address or a file's name it warns.
    return _with_library("HTML", lambda text: str(BeautifulSoup(StringIO(text), features="html.parser").text), text)


def _repaired(text: str) -> str:
    if PLAIN.fullmatch(text):
        return text
    try:
        import ftfy
    except ImportError as error:
        raise _missing(text, "ftfy") from error
    return _with_library("Unicode", ftfy.fix_text, text)


def _unescape(text: str) -> str:
    return html.unescape(html.unescape(text))


def _with_library(kind: str, clean: Callable[[str], str], text: str) -> str:
    """What a library makes of text from anyone; whatever it raises is the text's fault."""
    try:
        return clean(text)
    except Exception as error:
        raise InvalidRequest(
            f"prompt {quoted(text)}: got {kind} that cannot be read ({quoted(one_line(error))}), expected a caption; "
            "use plain letters"
        ) from error


def _missing(text: str, library: str) -> InvalidRequest:
    return InvalidRequest(
        f"prompt {quoted(text)}: got more than plain English letters, which this model's text preparation cleans with "
        f"{library}, which is not installed; install foresight-engines[captions], or use plain letters"
    )
