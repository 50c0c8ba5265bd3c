"""Captions are cleaned as diffusers' pipelines clean them, whatever is in them."""

from __future__ import annotations

import re
import sys
import threading
import time
from typing import Any

import pytest
from bs4.exceptions import ParserRejectedMarkup
from diffusers import LattePipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st

from foresight.engines.errors import Cancelled, InvalidRequest
from foresight.runtime.caption import ADDRESSES, MOST_TAGS, SIGNS, WORDS, clean_caption, clean_whitespace
from foresight.runtime.request import MAX_CHARACTERS

CAPTIONS = [
    "a dog in astronaut suit and sunglasses floating in space",
    "  A Dog, Running!  ",
    "a cat aesthetic score: 6.5.",
    "see https://example.com/cat?x=1 and www.example.org for more",
    "mail me@example.com, @nickname says hi",
    "<person> with a <b>hat</b> &amp; a &lt;stick&gt;",
    "这是一只猫 a cat 猫",
    "em — dash – and “quotes” ‘here’ ¨",
    "192.168.0.1 at 12:30  ",
    "number #12 and #123456 and 1234567",
    "photo.jpg cat_video.mp4 image.webp",
    "this-is-my-cute-cat and this_is_my_cute_cat",
    "jc6640 jc6640vc 6640vc231 j2d1a2a",
    "free shipping worldwide free shipping, free download free, click for more",
    "png image, jpeg images, page 12, 10x15 and 3.5x4",
    "schÃ¶n mojibake â€™ café",
    'quote: "a whole caption"',
    "a+b%20c %C3%A9",
    "***SALE***, #SALE ~ [x] {y} | z \\ /",
    "a ... b .. c . d",
    ".hidden",
    "'",
    "",
]


def reference(text: str) -> Any:
    pipeline = LattePipeline.__new__(LattePipeline)
    return pipeline._clean_caption(pipeline._clean_caption(text))


@pytest.mark.parametrize("text", CAPTIONS)
def test_a_caption_is_cleaned_as_diffusers_cleans_it(text: str) -> None:
    assert clean_caption(text) == reference(text)


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
@given(
    st.text(
        st.sampled_from("abcxyz A.,:;-_'\"/\\0123456789@#&<>%+~*()\t\néя猫“—×") | st.characters(codec="utf-8"),
        max_size=60,
    )
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_text_is_cleaned_as_diffusers_cleans_it(text: str) -> None:
    assert clean_caption(text) == reference(text)


@given(st.text(st.sampled_from("abc ABC.,:;-_'\"/0123456789@#+~*()=?!$^"), max_size=80))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_plain_english_needs_no_library(text: str) -> None:
    expected = reference(text)
    with pytest.MonkeyPatch.context() as patch:
        without_libraries(patch)
        assert clean_caption(text) == expected


def without_libraries(patch: pytest.MonkeyPatch) -> None:
    for name in ("bs4", "ftfy"):
        patch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("text", "library"), [("a café", "ftfy"), ("<b>a cat</b>", "beautifulsoup4")])
def test_without_the_libraries_other_text_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, library: str) -> None:
    without_libraries(monkeypatch)
    with pytest.raises(
        InvalidRequest, match=rf"{library}, which is not installed; install foresight-engines\[captions\]"
    ):
        clean_caption(text)


# Text that is only repaired


def repaired(text: str) -> str:
    return str(prompt_clean(text))


@pytest.mark.parametrize(
    "text",
    [
        *CAPTIONS,
        "  Two\tblanks \n and\u3000wide\u00a0ones\x85 ",
        "&amp;amp;amp;lt;b&gt; &copy 2020 &#x1F600;",
        "the \x1b[31mred\x1b[0m fox\x00",
        "ﬁne ligatures, ＦＵＬＬ width",
        "\ufeffa mark \u200b of order",
        "line\u2028separator\r\n",
    ],
)
def test_a_prompt_is_repaired_as_diffusers_repairs_it(text: str) -> None:
    assert clean_whitespace(text) == repaired(text)


@given(st.text(st.sampled_from("abXé猫Ã©â€™“ \t\n\u3000\xa0&;#x1<>amplt0") | st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_prompt_is_repaired_as_diffusers_repairs_it(text: str) -> None:
    assert clean_whitespace(text) == repaired(text)


def test_repairing_plain_english_needs_no_library_and_keeps_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    without_libraries(monkeypatch)
    assert clean_whitespace("  A Red\n\n Fox, 100% real! ") == "A Red Fox, 100% real!"
    with pytest.raises(InvalidRequest, match=r"ftfy, which is not installed; install foresight-engines\[captions\]"):
        clean_whitespace("a café")


# Rules as diffusers has them, which search a run anew from each of its characters: what they are about, and texts.
DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
PLAIN_RULES = {
    "https": (
        rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})",
        "",
        "a .com .co . : http https :// @ - / _ é www h % s:",
    ),
    "www": (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", "", "a .com .it . : http www www: w :/ @ - / _ é %"),
    "png": (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", "", "a . png jpeg jpg mp4 .png \u00a0 é"),
    r"\.\s": (r"\s+\.\s+", " ", ". a \u3000 \u2028 \u0085"),
    r"\d*[": (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ", "1 2 a B é _ \u0663 -"),
    "×": (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", "", "1 2 x х × . é _ \u0663"),
}


@pytest.mark.parametrize("about", PLAIN_RULES)
def test_a_rule_that_enters_a_run_once_finds_what_the_plain_one_finds(about: str) -> None:
    plain, replacement, alphabet = PLAIN_RULES[about]
    ours = next(rule for rule in (*ADDRESSES, *SIGNS, *WORDS) if about in rule[0].pattern and rule[0].pattern != plain)

    @given(st.lists(st.sampled_from([" ", *alphabet.split(" ")]), max_size=16).map("".join))
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    def check(text: str) -> None:
        assert ours[0].sub(ours[1], text) == re.sub(plain, replacement, text)

    check()


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
@given(
    st.lists(
        st.sampled_from([*"a.1×é@-_\"'# (\n", ".com", ".png", "://", "http", "x1", "free ", "page ", "click for"]),
        max_size=9,
    ),
    st.integers(1, 60),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_long_texts_are_cleaned_as_diffusers_cleans_them(pieces: list[str], times: int) -> None:
    text = ("".join(pieces) * times)[:MAX_CHARACTERS]
    assert clean_caption(text) == reference(text)


RUNS = [
    "a.",
    ".",
    "x",
    "1",
    " ",
    "\n",
    "a.com@",
    "a1a1",
    "1x",
    ". ",
    "a-",
    "http:",
    "@a",
    "é.",
    "free ",
    "&#1",
    "a+",
    "</a",
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("around", [("", ""), ("a1a", "é"), ("", "xxx"), ("a", " .")])
def test_time_grows_no_faster_than_the_text(run: str, around: tuple[str, str]) -> None:
    """A sixteenfold text takes sixteenfold time, where work per pair of characters would take 256-fold."""

    def seconds(characters: int) -> float:
        text = around[0] + (run * characters)[:characters] + around[1]
        started = time.thread_time()
        clean_caption(text)
        return time.thread_time() - started

    clean_caption("<é>")  # imports what it needs
    short = max(min(seconds(MAX_CHARACTERS // 4) for _ in range(3)), 5e-4)
    assert min(seconds(MAX_CHARACTERS * 4) for _ in range(2)) < 64 * short


@pytest.mark.parametrize("tag", ["<a ", "<a '", "<B>", "%3Cb "])
def test_a_caption_has_few_tags(tag: str) -> None:
    """Each that nothing closes costs a look at the rest of the text: 1,333 of them a fifth of a second."""
    assert clean_caption(tag * MOST_TAGS) == reference(tag * MOST_TAGS)
    with pytest.raises(InvalidRequest, match=rf"^prompt .*: got {MOST_TAGS + 1} HTML tags, expected"):
        clean_caption(tag * (MOST_TAGS + 1))


@pytest.mark.parametrize("text", ["a <![cat", "<![if cat]> a dog"])
def test_what_a_library_cannot_read_is_one_line(text: str) -> None:
    try:
        expected = reference(text)
    except ParserRejectedMarkup:
        with pytest.raises(InvalidRequest, match=r"^prompt '[^\n]*': got HTML that cannot be read"):
            clean_caption(text)
    else:
        assert clean_caption(text) == expected


def test_a_text_is_not_cleaned_on_once_its_request_is_cancelled() -> None:
    token = threading.Event()
    token.set()
    with pytest.raises(Cancelled, match="cancelled while its text was prepared"):
        clean_caption("a dog", token)
