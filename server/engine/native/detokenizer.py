"""Token ids -> text, token by token: whole characters only, and nothing of a stop string."""

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of one sequence as it grows.

    Text is held back while it could still become part of a stop string or ends inside a multi-byte character;
    `flush` gives the rest. `stopped` is True once a stop string was seen; it and what follows it are never given out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._text = ""
        self._given = 0
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._ids.append(token_id)
        self._text += self._new_text(token_id)
        self._find_stop()
        return self._give(len(self._text) if self.stopped else len(self._text) - self._held_back())

    def flush(self) -> str:
        """All text that was held back, at the end of the sequence."""
        if not self.stopped:
            whole = self._whole()
            if whole.startswith(
                self._text
            ):  # an unfinished character at the very end is only in the whole text
                self._text = whole
                self._find_stop()
        return self._give(len(self._text))

    def _new_text(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        except Exception:  # it raises nothing more exact
            # Where characters are spelled in byte tokens, one that completes none unmakes those spelled just before it.
            # What was given out stays; the new text is what the whole has beyond it.
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
            return self._whole()[len(self._text) :]

    def _whole(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _find_stop(self) -> None:
        found = [
            at for at in (self._text.find(stop, self._given) for stop in self._stop) if at >= 0
        ]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        open_text = self._text[self._given :]
        lengths = (
            n for stop in self._stop for n in range(1, len(stop)) if open_text.endswith(stop[:n])
        )
        return max(lengths, default=0)

    def _give(self, end: int) -> str:
        text, self._given = self._text[self._given : end], max(self._given, end)
        return text
