"""server.engine.native.detokenizer: the text equals decoding at once, cut at stop strings."""

from collections.abc import Sequence
from typing import Any

import tiny
import tiny_configs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.engine.native.detokenizer import Detokenizer
from server.engine.request import SamplingParams

LETTERS = st.sampled_from("abc the€日🙂é�")
TEXTS = st.text(st.one_of(LETTERS, st.characters(exclude_categories=("Cs",))), max_size=12)


# Special tokens, and ids beyond the vocabulary, among them.
ANY_IDS = st.lists(st.integers(0, tiny_configs.VOCAB + 5), max_size=14)
IDS = st.one_of(ANY_IDS, TEXTS.map(lambda text: tiny.tokenizer().encode(text)))


def deltas(
    token_ids: Sequence[int],
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> list[str]:
    """The text returned for each token, until a stop string, and at the end."""
    sampling = SamplingParams(stop=tuple(stop), **options)
    detokenizer = Detokenizer(tokenizer or tiny.tokenizer(), sampling)
    returned = []
    for token_id in token_ids:
        returned.append(detokenizer.add(token_id))
        if detokenizer.stopped:
            break
    return [*returned, detokenizer.flush()]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(token_ids=IDS, text=TEXTS)
def test_the_text_is_the_one_that_decoding_at_once_gives(token_ids: list[int], text: str) -> None:
    spelled = tiny.byte_fallback_tokenizer()
    for tokenizer, ids in ((tiny.tokenizer(), token_ids), (spelled, spelled.encode(text))):
        at_once = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(deltas(ids, tokenizer=tokenizer)) == at_once


@settings(derandomize=True, max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, len(tiny.byte_fallback_tokenizer())), max_size=10))
@example([ord("r"), 0xA1, 262])
def test_bytes_that_spell_no_character_are_no_error(token_ids: list[int]) -> None:
    """They change the characters before them, which were returned already and stay as they are."""
    text = "".join(deltas(token_ids, tokenizer=tiny.byte_fallback_tokenizer()))
    if token_ids and token_ids[-1] == 262:  # " the"
        assert text.endswith("the")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(token_ids=IDS)
@example([0, 34, 1, 35])
def test_special_tokens_have_a_text_if_asked_for(token_ids: list[int]) -> None:
    at_once = tiny.tokenizer().decode(token_ids, skip_special_tokens=False)
    assert "".join(deltas(token_ids, skip_special_tokens=False)) == at_once


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=9),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 9),
    is_included=st.booleans(),
)
@example("xabd".replace("x", "b").replace("d", "b"), ["ab", "babb"], 3, False)
def test_a_stop_string_counts_only_once_there_are_min_tokens_and_may_be_included(
    text: str, stop: list[str], min_tokens: int, is_included: bool
) -> None:
    """Each token is one letter. Of those that end first, the one that begins earliest counts."""
    token_ids = [tiny.tokenizer().convert_tokens_to_ids(letter) for letter in text]
    expected = text
    for end in range(min_tokens + 1, len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            expected = text[: end if is_included else min(starts)]
            break
    options = {"min_tokens": min_tokens, "include_stop_str_in_output": is_included}
    assert "".join(deltas(token_ids, stop, **options)) == expected


@settings(derandomize=True, max_examples=300, deadline=None)
@given(token_ids=IDS, data=st.data())
def test_no_part_of_a_stop_string_is_returned(token_ids: list[int], data: st.DataObject) -> None:
    """The text is the whole text, cut where the stop string first begins.

    The stop string may be anywhere, and run over any number of tokens.
    """
    whole = tiny.tokenizer().decode(token_ids, skip_special_tokens=True)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    length = data.draw(st.integers(1, 4))
    stop = whole[begin : begin + length] or "x"
    expected, _, _ = whole.partition(stop)
    assert "".join(deltas(token_ids, (stop,))) == expected


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=9),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=2, max_size=3),
)
def test_the_first_complete_stop_string_ends_the_text_where_the_earliest_begins(
    text: str, stop: list[str]
) -> None:
    """Each token is one letter."""
    token_ids = [tiny.tokenizer().convert_tokens_to_ids(letter) for letter in text]
    expected = text
    for length in range(len(text) + 1):
        complete = [each for each in stop if each in text[:length]]
        if complete:
            expected = text[: min(text.index(each) for each in complete)]
            break
    assert "".join(deltas(token_ids, tuple(stop))) == expected


def test_text_is_returned_as_soon_as_it_is_certain() -> None:
    for tokenizer in (tiny.tokenizer(), tiny.byte_fallback_tokenizer()):
        token_ids = tokenizer.convert_tokens_to_ids([*"abcat"])
        assert deltas(token_ids, ("cb",), tokenizer) == ["a", "b", "", "ca", "t", ""]


def test_a_character_is_returned_whole() -> None:
    euro = tiny.tokenizer().convert_tokens_to_ids(["â", "Ĥ", "¬", "a"])
    assert deltas(euro) == ["", "", "€", "a", ""]


def test_a_character_left_unfinished_at_the_end_is_decoded_as_at_once() -> None:
    euro = tiny.tokenizer().convert_tokens_to_ids(["â", "Ĥ"])
    assert deltas(euro) == ["", "", "�"]
