"""Captions are cleaned as diffusers' pipelines clean them, whatever is in them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from diffusers import LattePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from foresight.engines.errors import InvalidRequest
from foresight.runtime.caption import clean_caption

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
