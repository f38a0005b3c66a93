"""Encodes foreign text inside markup: special tokens that it spells stay text.

A tokenizer knows a special token (`<|im_end|>`) by its text, so whoever may write a message could
end it and speak as somebody else.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from crma.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, render: Callable[[T], str], given: T
) -> list[int]:
    """Token ids of the text that `render` makes of `given`, encoded whole.

    Where no text of `given` spells a special token, they are those of
    `tokenizer.encode(render(given), add_special_tokens=False)`. Where one does, they are those that
    the same tokenizer would give if that token had another name: its text, merged with its
    neighbours. Added tokens that are not special (`<think>`) are words of the vocabulary, and are
    recognised wherever they stand.

    Args:
        render: puts markup around the texts. It sees a special token that a text spells as as many
            private-use characters.
        given: a text, or texts in lists and mappings.
    """
    specials = _specials(tokenizer)
    texts = list(_texts(given))
    if not any(specials.pattern.search(text) for text in texts):
        return tokenizer.encode(render(given), add_special_tokens=False)
    stand_ins = _StandIns(specials.pattern, texts)
    return specials.encode(render(stand_ins.put_into(given)), stand_ins)


class _StandIns:
    """Private-use characters in place of the characters of the special tokens in some texts.

    Raises ConfigError if the texts use up every such character themselves.
    """

    def __init__(self, pattern: re.Pattern[str], texts: Iterable[str]) -> None:
        self._pattern = pattern
        whole = "\0".join(texts)
        spelled = sorted(set("".join(pattern.findall(whole))))
        used = set(whole)
        unused = (code for codes in _PRIVATE_USE for code in codes if chr(code) not in used)
        self._stand_ins = {ord(char): code for char, code in zip(spelled, unused, strict=False)}
        if len(self._stand_ins) < len(spelled):
            message = "messages: every private-use character is taken"
            raise ConfigError(message, field="messages", value=len(used), allowed="fewer of them")
        self._originals = {code: char for char, code in self._stand_ins.items()}

    def put_into(self, value: Any) -> Any:
        """A copy of texts, lists and mappings in which no text spells a special token."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0].translate(self._stand_ins), value)
        if isinstance(value, Mapping):
            return {self.put_into(key): self.put_into(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_into(each) for each in value]
        return value

    def replace_by_originals(self, text: str) -> str:
        """The text with the characters that were stood in for."""
        return text.translate(self._originals)


class _Specials:
    """The special tokens of a tokenizer, and a way to encode only some of them as such."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self._by_id = {token_id: each for token_id, each in added.items() if each.special}
        self._original = tokenizer
        texts = sorted((each.content for each in self._by_id.values()), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def encode(self, rendered: str, stand_ins: _StandIns) -> list[int]:
        """Token ids of a rendering: special tokens behind stand-ins are text, others are tokens."""
        tokenizer, names, id_of_name = self._renamed
        markup = self.pattern.sub(lambda found: names[found[0]], rendered)
        text = stand_ins.replace_by_originals(markup)
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [id_of_name.get(token_id, token_id) for token_id in ids]

    @cached_property
    def _renamed(self) -> tuple[PreTrainedTokenizerBase, dict[str, str], dict[int, int]]:
        """A copy that knows each special token by a secret name too, which no text can spell.

        A secret name is not special, so it is recognised where special tokens are encoded as text.

        Returns:
            The copy; special token -> secret name; id of a secret name -> id of the special token.
        """
        from tokenizers import AddedToken

        secret = secrets.token_hex(16)
        tokenizer = copy.deepcopy(self._original)
        names = {}
        id_of_name = {}
        for token_id, token in self._by_id.items():
            name = f"⟦{secret}{token_id}⟧"
            alias = AddedToken(
                name,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
            )
            tokenizer.add_tokens([alias])
            names[token.content] = name
            id_of_name[tokenizer.convert_tokens_to_ids(name)] = token_id
        return tokenizer, names, id_of_name


@lru_cache(maxsize=8)
def _specials(tokenizer: PreTrainedTokenizerBase) -> _Specials:
    return _Specials(tokenizer)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a text, a list or a mapping; keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
