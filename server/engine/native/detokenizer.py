"""Token ids to text, token by token: whole characters only, and no part of a stop string."""

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of one sequence as it grows.

    It holds text back that could still become part of a stop string, or that ends inside a
    multi-byte character; `flush` returns the rest.

    Args:
        tokenizer: a fast tokenizer.
        stop: strings that end the text.

    Attributes:
        stopped: whether the text has reached a stop string. Neither the stop string nor any text
            after it is ever returned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._text = ""
        self._num_returned = 0  # characters

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
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
            return self._decode_all()[len(self._text) :]

    def _decode_all(self) -> str:
        return self._tokenizer.decode(
            self._token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _cut_at_stop(self) -> None:
        """Cut the text where the earliest stop string begins, if there is one."""
        starts = [self._text.find(stop, self._num_returned) for stop in self._stop]
        found = [start for start in starts if start >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _num_held_back(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        open_text = self._text[self._num_returned :]
        longest = 0
        for stop in self._stop:
            for length in range(1, len(stop)):
                if open_text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest

    def _return_up_to(self, end: int) -> str:
        text = self._text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return text
