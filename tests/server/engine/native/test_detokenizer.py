"""server.engine.native.detokenizer: the same text token by token as at once, and nothing of a stop string."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from server.engine.native.detokenizer import Detokenizer

TEXTS = st.text(
    st.one_of(st.sampled_from("abc the€日🙂é�"), st.characters(exclude_categories=("Cs",))),
    max_size=12,
)


@cache
def spelled() -> PreTrainedTokenizerFast:
    """As Llama 2's, Gemma's and Mistral's: ▁ for a space, and characters out of the vocabulary spelled in bytes."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {
        w: 256 + i for i, w in enumerate(["▁", *"abct€", "▁the"])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


any_ids = st.lists(
    st.integers(0, tiny.VOCAB + 5), max_size=14
)  # special tokens and ids of no token too
ids = st.one_of(any_ids, TEXTS.map(lambda text: tiny.tokenizer().encode(text)))


def deltas(tokens: Sequence[int], stop: Sequence[str] = (), which: Any = None) -> list[str]:
    """What is given out at each token, until a stop string, and at the end."""
    detokenizer, given = Detokenizer(which or tiny.tokenizer(), tuple(stop)), []
    for token in tokens:
        given.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    return [*given, detokenizer.flush()]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(tokens=ids, text=TEXTS)
def test_the_text_is_what_decoding_at_once_gives(tokens: list[int], text: str) -> None:
    for which, those in ((tiny.tokenizer(), tokens), (spelled(), spelled().encode(text))):
        assert "".join(deltas(those, which=which)) == which.decode(those, skip_special_tokens=True)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, len(spelled())), max_size=10))
@example([ord("r"), 0xA1, 262])
def test_bytes_that_spell_nothing_are_no_error(tokens: list[int]) -> None:
    """They turn characters before them, which were given out, into ones that are none: what was given out stays."""
    given = deltas(tokens, which=spelled())
    if tokens and tokens[-1] == 262:  # " the"
        assert "".join(given).endswith("the")


@settings(derandomize=True, max_examples=300, deadline=None)
@given(tokens=ids, data=st.data())
def test_nothing_of_a_stop_string_is_given_out(tokens: list[int], data: st.DataObject) -> None:
    """At any place, over any number of tokens: the text is the whole text cut where the stop string first begins."""
    full = tiny.tokenizer().decode(tokens, skip_special_tokens=True)
    begin = data.draw(st.integers(0, max(0, len(full) - 1)))
    stop = full[begin : begin + data.draw(st.integers(1, 4))] or "x"
    given = "".join(deltas(tokens, (stop,)))
    assert given == full[: full.index(stop)] if stop in full else given == full


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=9),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=2, max_size=3),
)
def test_of_several_stop_strings_none_is_given_out(text: str, stop: list[str]) -> None:
    """A token a letter: the first stop string to be complete ends it, at the place where the earliest begins."""
    letters = [tiny.tokenizer().convert_tokens_to_ids(letter) for letter in text]
    seen = next((text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in stop)), None)
    expected = text if seen is None else seen[: min(seen.index(s) for s in stop if s in seen)]
    assert "".join(deltas(letters, tuple(stop))) == expected


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    for which in (tiny.tokenizer(), spelled()):
        assert deltas(which.convert_tokens_to_ids([*"abcat"]), ("cb",), which) == [
            "a",
            "b",
            "",
            "ca",
            "t",
            "",
        ]
    euro = tiny.tokenizer().convert_tokens_to_ids(["â", "Ĥ", "¬", "a"])
    assert deltas(euro) == ["", "", "€", "a", ""], "a character comes whole"
    assert deltas(euro[:2]) == ["", "", "�"], (
        "an unfinished one at the end, as decoding at once gives it"
    )
