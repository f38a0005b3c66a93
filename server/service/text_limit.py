"""How long a text can be and still fit the model's context, known before it is encoded."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers.models import BPE, Model

from crma.models.byte_letters import letters_of_bytes
from server.engine.errors import EngineError, PromptTooLong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_COMPOSED = 4
"""Characters of a text that Unicode's composition makes one of, at most."""

_CONTINUATIONS = range(0x80, 0xC0)  # the bytes of UTF-8 that every longer character ends in
_LOSSLESS = {"ByteLevel", "Digits", "Metaspace", "Split", "Punctuation"}
_KEEPS_LENGTH = {"NFD", "NFKD", "Prepend", "Lowercase"}
_COMPOSES = {"NFC", "NFKC"}


@dataclass(frozen=True)
class TextLimit:
    """The length from which a text surely has too many tokens.

    Attributes:
        num_chars: the most characters, if it is ASCII.
        num_composed: if it is not, so that the tokenizer may compose some of them.
        unknown: characters that are in no token, and do not count.
    """

    num_chars: int
    num_composed: int
    unknown: str = ""

    def of(self, text: str) -> int:
        """The most characters that a text of this kind can have."""
        return self.num_chars if text.isascii() else self.num_composed

    def exceeded_by(self, text: str) -> bool:
        """Whether the text cannot fit, whatever its tokens are."""
        if len(text) <= self.num_chars:
            return False
        return len(text) - sum(map(text.count, self.unknown)) > self.of(text)


class TextTooLong(PromptTooLong):
    """A prompt that has more characters than any prompt that fits the model's context.

    Clients of OpenAI look for the words "maximum context length is N tokens", and read N.
    """

    def __init__(self, num_chars: int, max_chars: int, max_model_len: int) -> None:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"has {num_chars} characters, and at most {max_chars} can have so few tokens."
        )
        allowed = f"<= {max_chars} characters, and prompt tokens + max_tokens <= {max_model_len}"
        EngineError.__init__(self, message, field="prompt", value=num_chars, allowed=allowed)


def text_limit(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TextLimit | None:
    """The limit of texts with at most `max_tokens` tokens.

    No token stands for more characters than its name in the vocabulary has, if the tokenizer is one
    that leaves out no part of a text. Of any other tokenizer None is known: white space without end
    may be no token at all.
    """
    backend = tokenizer.backend_tokenizer
    names = tokenizer.get_vocab().keys()
    growth = _growth(_described(backend.normalizer))
    unknown = _unknown(backend.model, names)
    if growth is None or unknown is None or not _keeps_text(tokenizer):
        return None
    longest = max(map(len, names))
    return TextLimit(max_tokens * longest, max_tokens * longest * growth, unknown)


def _described(part: Any) -> dict[str, Any] | None:
    """What the library writes of a normalizer or pre-tokenizer; None if there is none."""
    return None if part is None else json.loads(part.__getstate__())


def _keeps_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every character that the model knows is in one of the tokens."""
    if any(each.lstrip or each.rstrip for each in tokenizer.added_tokens_decoder.values()):
        return False
    parts = _parts(_described(tokenizer.backend_tokenizer.pre_tokenizer), "pretokenizers")
    return all(part["type"] in _LOSSLESS and part.get("behavior") != "Removed" for part in parts)


def _unknown(model: Model, names: Collection[str]) -> str | None:
    """The characters that have no token; None: there are too many to list.

    A character of several bytes is known by any of them.
    """
    if not isinstance(model, BPE):
        return None
    name_of = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    if not model.byte_fallback:
        name_of = letters_of_bytes()
    missing = [byte for byte, name in name_of.items() if name not in names]
    if any(byte in _CONTINUATIONS for byte in missing):
        return None
    return "".join(chr(byte) for byte in missing if byte < min(_CONTINUATIONS))


def _growth(normalizer: dict[str, Any] | None) -> int | None:
    """How many characters become one at most; None: there is no limit."""
    growth = 1
    for part in _parts(normalizer, "normalizers"):
        kind = part["type"]
        if kind in _COMPOSES:
            growth *= MAX_COMPOSED
        elif kind == "Replace":
            replaced = part["pattern"].get("String")
            if replaced is None or len(replaced) > len(part["content"]):
                return None
        elif kind not in _KEEPS_LENGTH:
            return None
    return growth


def _parts(described: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer; one may be a list of others."""
    if described is None:
        return []
    if described["type"] != "Sequence":
        return [described]
    return [part for each in described[name] for part in _parts(each, name)]
