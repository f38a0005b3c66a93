"""server.service.token_texts: the bytes and the text of every token."""

import pytest
import tiny
import tiny_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from server.service.token_texts import TokenTexts

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(tiny.tokenizer())


@settings(derandomize=True, max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_bytes_of_a_text_are_those_of_its_tokens(text: str) -> None:
    for tokenizer, start in ((tiny.tokenizer(), b""), (tiny.byte_fallback_tokenizer(), b" ")):
        found = TokenTexts(tokenizer)
        data = b"".join(found.bytes_of(token_id) for token_id in tokenizer.encode(text))
        assert data == (start if text else b"") + text.encode()


def test_a_part_of_a_character_has_bytes_and_is_shown_as_openai_shows_it(texts: TokenTexts) -> None:
    first, second, *_ = tiny.tokenizer().encode("😀")
    assert texts.bytes_of(first) == b"\xf0\x9f"
    assert texts.text_of(first) == r"\xf0\x9f"
    assert texts.text_of(second) == r"\x98"


def test_special_tokens_are_known_and_spelled_out(texts: TokenTexts) -> None:
    assert texts.text_of(1) == "<|im_end|>"
    assert texts.is_special(1)
    assert not texts.is_special(5)
    assert texts.bytes_of(tiny_configs.VOCAB + 5) == b"", "there is no such token"
