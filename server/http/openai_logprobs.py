"""Log-probabilities of tokens in OpenAI's two forms."""

import codecs
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from server.engine.request import TokenLogprob
from server.service.token_texts import TokenTexts

LEAST = -9999.0
"""What OpenAI shows for a token that is all but impossible; JSON has no infinity."""


class TextOffsets:
    """Where the tokens of one choice begin in its text, in characters.

    A token that begins inside a character has the place of that character.

    Args:
        texts: the tokens' bytes.
        skips_special: special tokens of the answer have no text.
    """

    def __init__(self, texts: TokenTexts, *, skips_special: bool) -> None:
        self._texts = texts
        self._skips_special = skips_special
        self._num_chars = 0  # whole characters so far
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, token_ids: Sequence[int], text: str) -> list[int]:
        """The places of a prompt's tokens in `text`, with which the choice begins.

        What the tokenizer put before the text, a start token or a space, is no part of it.
        """
        pieces = [self._texts.bytes_of(token_id) for token_id in token_ids]
        data = text.encode()
        num_added = max(0, b"".join(pieces).rfind(data))
        ends = [max(0, end - num_added) for end in accumulate(map(len, pieces), initial=0)]
        offsets = [self._place(data[begin:end]) for begin, end in pairwise(ends)]
        self.pass_prompt(text)
        return offsets

    def pass_prompt(self, text: str) -> None:
        """Go on after a prompt."""
        self._num_chars = len(text)
        self._decoder.reset()

    def of_answer(self, token_ids: Sequence[int]) -> list[int]:
        """The places of the answer's next tokens."""
        offsets = []
        for token_id in token_ids:
            is_shown = not (self._skips_special and self._texts.is_special(token_id))
            offsets.append(self._place(self._texts.bytes_of(token_id) if is_shown else b""))
        return offsets

    def _place(self, piece: bytes) -> int:
        """The place of the next token, whose bytes are `piece`."""
        place = self._num_chars
        self._num_chars += len(self._decoder.decode(piece))
        return place


class CompletionLogprobs:
    """The log-probabilities of one choice of /v1/completions, as its tokens come.

    OpenAI's legacy form is four lists with one entry a token.

    Args:
        texts: the tokens' texts and bytes.
        skips_special: special tokens of the answer have no text.
    """

    def __init__(self, texts: TokenTexts, *, skips_special: bool) -> None:
        self._texts = texts
        self._offsets = TextOffsets(texts, skips_special=skips_special)

    def of_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], text: str
    ) -> dict[str, list[Any]]:
        """Those of an echoed prompt; its first token has none.

        Args:
            logprobs: one for each token but the first.
            text: the prompt as it is echoed.
        """
        offsets = self._offsets.of_prompt(token_ids, text)
        return self._lists(token_ids, [None, *logprobs], offsets)

    def pass_prompt(self, text: str) -> None:
        """Go on after an echoed prompt whose log-probabilities another choice has."""
        self._offsets.pass_prompt(text)

    def of_answer(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]
    ) -> dict[str, list[Any]]:
        """Those of the answer's next tokens."""
        return self._lists(token_ids, logprobs, self._offsets.of_answer(token_ids))

    def _lists(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        offsets: list[int],
    ) -> dict[str, list[Any]]:
        pairs = list(zip(token_ids, logprobs, strict=True))
        return {
            "tokens": [self._texts.name_of(token_id) for token_id in token_ids],
            "token_logprobs": [None if each is None else shown(each.logprob) for each in logprobs],
            "top_logprobs": [self._top(*pair) for pair in pairs],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprob: TokenLogprob | None) -> dict[str, float] | None:
        """The most probable tokens, and the chosen one, which may be one more than asked for.

        Of tokens with one name, the most probable counts.
        """
        if logprob is None:
            return None
        top: dict[str, float] = {}
        for each, value in (*logprob.top, (token_id, logprob.logprob)):
            top.setdefault(self._texts.name_of(each), shown(value))
        return top


def chat_logprob(texts: TokenTexts, token_id: int, logprob: TokenLogprob) -> dict[str, Any]:
    """One token of /v1/chat/completions, and the most probable tokens in its place."""
    top = [_entry(texts, *each) for each in logprob.top]
    return {**_entry(texts, token_id, logprob.logprob), "top_logprobs": top}


def _entry(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": texts.text_of(token_id),
        "logprob": shown(logprob),
        "bytes": list(texts.bytes_of(token_id)),
    }


def shown(logprob: float) -> float:
    """A log-probability as an answer has it: never infinite."""
    return max(logprob, LEAST)
