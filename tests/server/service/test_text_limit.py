"""server.service.text_limit: nothing that fits is refused, whatever it is written in."""

import copy
import json
import unicodedata
from typing import Any

import pytest
import tiny
from families import FAMILIES, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import NFC, NFKC, Lowercase, Replace, Sequence, Strip, StripAccents
from transformers import PreTrainedTokenizerFast

from server.service.text_limit import MAX_COMPOSED, text_limit

NAMES = sorted(tiny.tokenizer().get_vocab(), key=len, reverse=True)
LONGEST = len(NAMES[0])


def with_normalizer(normalizer: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


COMPOSING = with_normalizer(NFC())
TEXTS = (
    st.text()
    | st.text(alphabet="e\u0301\u0323 \n\t본ㅂㅗ\u1103\u1161\u11ab🙂")
    | st.sampled_from(NAMES)
)


@given(st.lists(TEXTS).map("".join))
def test_every_text_is_within_the_limit_of_its_tokens(text: str) -> None:
    for tokenizer in (tiny.tokenizer(), COMPOSING):
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
        limit = text_limit(tokenizer, num_tokens)
        assert limit is not None
        assert not limit.exceeded_by(text)
        assert len(text) <= limit.of(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_for_every_family_that_has_one(family: str) -> None:
    tokenizer = tokenizer_of(family)
    texts = [
        "",
        "the café " * 50,
        " " * 200,
        "e\u0301" * 100,
        "🙂本" * 50,
        "<|im_end|>" * 20,
        "\x00",
    ]
    for text in texts:
        limit = text_limit(tokenizer, len(tokenizer.encode(text, add_special_tokens=False)))
        assert limit is None or len(text) <= limit.of(text)


def test_it_is_that_many_of_the_longest_token() -> None:
    limit = text_limit(tiny.tokenizer(), 3)
    assert limit is not None
    assert limit.num_chars == limit.num_composed == 3 * LONGEST
    assert not limit.exceeded_by("x" * 3 * LONGEST)
    assert limit.exceeded_by("x" * (3 * LONGEST + 1))


@pytest.mark.parametrize(
    ("normalizer", "growth"),
    [(NFC(), 4), (Sequence([NFKC(), Lowercase()]), 4), (Replace(" ", "▁"), 1)],
)
def test_composed_characters_count_as_many_unless_all_is_ascii(
    normalizer: Any, growth: int
) -> None:
    limit = text_limit(with_normalizer(normalizer), 1)
    assert limit is not None
    assert limit.num_composed == growth * limit.num_chars
    assert limit.exceeded_by("x" * (LONGEST + 1))
    assert limit.exceeded_by("é" * (LONGEST + 1)) == (growth == 1)


def test_unicode_composes_no_more_characters_than_are_counted() -> None:
    """Every character whose decomposition composition could undo."""
    longest = max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000))
    assert longest <= MAX_COMPOSED


@pytest.mark.parametrize(
    "normalizer", [Strip(), StripAccents(), Replace("  ", " "), Sequence([NFC(), Strip()])]
)
def test_where_text_may_vanish_there_is_no_limit(normalizer: Any) -> None:
    assert text_limit(with_normalizer(normalizer), 100) is None


def test_where_a_token_takes_the_spaces_around_it_there_is_no_limit() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert text_limit(tokenizer, 100) is None


def without(letter: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without the letter of a byte."""
    described = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    described["model"]["vocab"] = {name: i for name, i in vocab.items() if letter not in name}
    merges = described["model"]["merges"]
    described["model"]["merges"] = [pair for pair in merges if letter not in "".join(pair)]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))


def test_characters_without_a_token_do_not_count() -> None:
    """As some control characters of SmolLM2: any number of them is no token."""
    tokenizer = without("Ą")  # the letter of byte 4
    assert tokenizer.encode("\x04" * 1000) == []
    limit = text_limit(tokenizer, 1)
    assert limit is not None
    assert limit.unknown == "\x04"
    assert not limit.exceeded_by("\x04" * 1000 + "x" * limit.num_chars)
    assert limit.exceeded_by("\x04" * 1000 + "x" * (limit.num_chars + 1))


def test_where_whole_characters_are_unknown_there_is_no_limit() -> None:
    assert text_limit(without("Ģ"), 100) is None  # the letter of byte 0x80, which ends many
