"""Token ids to text, token by token: whole characters only, and no part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from server.engine.request import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of one sequence as it grows.

    It holds text back that could still become part of a stop string, or that ends inside a
    multi-byte character; `flush` returns the rest.

    Args:
        tokenizer: a fast tokenizer.
        sampling: its stop strings end the text, and whether special tokens have a text.

    Attributes:
        stopped: whether the text has reached a stop string. No text after the stop string is ever
            returned, nor the stop string itself unless `include_stop_str_in_output`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._skips_special = sampling.skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=self._skips_special)
        self._token_ids: list[int] = []
        self._text = ""
        self._num_returned = 0  # characters
        self._num_exempt = 0  # characters; a stop string has to end after them

    def add(self, token_id: int) -> str:
        """Return the text that is certain now that this token follows; often empty."""
        self._token_ids.append(token_id)
        self._text += self._decode(token_id)
        self._cut_at_stop()
        if self.stopped:
            return self._return_up_to(len(self._text))
        return self._return_up_to(len(self._text) - self._num_held_back())

    def flush(self) -> str:
        """Return all text that was held back, at the end of the sequence."""
        if not self.stopped:
            whole = self._decode_all()
            # Only the whole text has a character that is left unfinished at the very end.
            if whole.startswith(self._text):
                self._text = whole
                self._cut_at_stop()
        return self._return_up_to(len(self._text))

    def _decode(self, token_id: int) -> str:
        """Return the text that a token adds."""
        try:
            return self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        except Exception:  # the library raises no narrower type
            # Some tokenizers spell characters in byte tokens. A byte that completes no character
            # changes the text of the bytes before it, which may have been returned already. Keep
            # that text, and add what the whole text has beyond its length.
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=self._skips_special)
            return self._decode_all()[len(self._text) :]

    def _decode_all(self) -> str:
        return self._tokenizer.decode(
            self._token_ids,
            skip_special_tokens=self._skips_special,
            clean_up_tokenization_spaces=False,
        )

    def _cut_at_stop(self) -> None:
        """Cut the text at the stop string that begins earliest, if there is one."""
        if len(self._token_ids) <= self._sampling.min_tokens:
            self._num_exempt = len(self._text)
            return
        found = []
        for stop in self._sampling.stop:
            first = max(self._num_returned, self._num_exempt - len(stop) + 1)
            start = self._text.find(stop, first)
            if start >= 0:
                found.append((start, start + len(stop)))
        if found:
            start, end = min(found)
            self._text = self._text[: end if self._sampling.include_stop_str_in_output else start]
            self.stopped = True

    def _num_held_back(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        open_text = self._text[self._num_returned :]
        longest = 0
        for stop in self._sampling.stop:
            for length in range(1, len(stop)):
                if open_text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest

    def _return_up_to(self, end: int) -> str:
        text = self._text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return text
