"""What single tokens stand for: their bytes and their text, each found once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from crma.models.byte_letters import letters_of_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class TokenTexts:
    """The bytes and the text of the tokens of one tokenizer.

    A token may be part of a character. Its bytes are known all the same, from the way in which the
    tokenizer spells tokens: each byte as one letter (GPT-2, Llama 3, Qwen), or ▁ for a space and
    <0x0A> for a byte (Llama 2, Gemma, Mistral).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        self._decoders = frozenset(_decoder_kinds(tokenizer))
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._names: dict[int, str] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether the token is markup, such as the start or the end of a text."""
        return token_id in self._added and self._added[token_id].special

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of the token in UTF-8; none if there is no such token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def text_of(self, token_id: int) -> str:
        r"""The text of the token; bytes that are part of a character as OpenAI shows them: \xf0."""
        found = self._texts.get(token_id)
        if found is None:
            found = self.bytes_of(token_id).decode("utf-8", "backslashreplace")
            self._texts[token_id] = found
        return found

    def name_of(self, token_id: int) -> str:
        """The text of the token; of one that is not whole characters, "bytes:" and its bytes."""
        found = self._names.get(token_id)
        if found is None:
            text = self.text_of(token_id)
            is_text = self.bytes_of(token_id) == text.encode()
            found = self._names[token_id] = text if is_text else f"bytes:{text}"
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        byte_of = _byte_of_letter()
        if "ByteLevel" in self._decoders and byte_of.keys() >= set(token):
            return bytes(byte_of[letter] for letter in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None and "ByteFallback" in self._decoders:
            return bytes.fromhex(byte[1])
        if self._decoders & {"Replace", "Metaspace"}:
            return token.replace("▁", " ").encode()
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text.encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """The letter by which a byte-level tokenizer spells a byte, to that byte."""
    return {letter: byte for byte, letter in letters_of_bytes().items()}


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The kinds of decoders by which the tokenizer turns its tokens into text."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return
    description: dict[str, Any] = json.loads(decoder.__getstate__())
    yield description["type"]
    for part in description.get("decoders", ()):
        yield part["type"]
