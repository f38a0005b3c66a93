"""A tokenizer as transformers configures it, without transformers' own object.

transformers' own changes its backend before each use, so no two threads can share one. This one
never changes: all threads share it, and the vocabulary is in memory once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def for_another_thread(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with which another thread may encode at the same time."""
    if isinstance(tokenizer, PlainTokenizer):
        return tokenizer
    return copy.deepcopy(tokenizer)


def import_templates() -> None:
    """Import what renders chat templates, so that the first of them does not wait for it."""
    import_module("transformers.utils.chat_template_utils")


class PlainTokenizer:
    """Stands for transformers' tokenizer wherever a model is served. Its methods are those of
    `PreTrainedTokenizerBase` that serving needs, with the same results.

    Args:
        backend: pads and truncates nothing.
        special_tokens_map: the name of a special token's role, such as "eos_token", to its text.
        all_special_tokens: the texts of those, and of others without a role.
        chat_template: one template; or several by name; or None.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens_map: Mapping[str, str],
        all_special_tokens: Sequence[str],
        chat_template: str | Mapping[str, str] | None,
    ) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(special_tokens_map)
        self.all_special_tokens = list(all_special_tokens)
        self.chat_template = chat_template
        self.bos_token = self.special_tokens_map.get("bos_token")
        self.eos_token = self.special_tokens_map.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None: there is none."""
        return None if self.eos_token is None else self.convert_tokens_to_ids(self.eos_token)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are recognised before a text is split, by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: those that the tokenizer puts around each text.
            split_special_tokens: what spells a special token is text.
        """
        backend = self._literal if split_special_tokens else self.backend_tokenizer
        # A batch, because for that the library lets other threads of the interpreter run.
        [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """The text of tokens. `clean_up_tokenization_spaces` has to be False."""
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces: served texts stay as they are")
        ids = list(token_ids)
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The name of a token, or of each of several; None for an id without a token."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(token_id) for token_id in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; if there is none, that of the unknown token, or None."""
        found = self.backend_tokenizer.token_to_id(token)
        unknown = self.special_tokens_map.get("unk_token")
        if found is not None or unknown is None:
            return found
        return self.backend_tokenizer.token_to_id(unknown)

    def get_vocab(self) -> dict[str, int]:
        """Every token by its name, with those that were added."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """The tokens of `added_tokens_decoder` by their names."""
        return {token.content: i for i, token in sorted(self.added_tokens_decoder.items())}

    def add_tokens(self, tokens: Sequence[AddedToken]) -> int:
        """Add tokens to a copy that nobody else uses. Returns how many are new."""
        self.__dict__.pop("_literal", None)
        return self.backend_tokenizer.add_tokens(list(tokens))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """The text that a chat template makes of a conversation; `tokenize` has to be False.

        Raises:
            ValueError: there is no template, or no message.
            Exception: whatever the template raises.
        """
        # Here, because an engine needs nothing else of transformers.
        from transformers.utils.chat_template_utils import render_jinja_template

        if tokenize:
            raise ValueError("tokenize: a rendering is encoded by crma.models.inert_text")
        if not conversation:
            raise ValueError("a chat template needs at least one message")
        (text,), _ = render_jinja_template(
            conversations=[conversation],
            tools=tools,
            documents=documents,
            chat_template=self._template(chat_template, tools is not None),
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **variables},
        )
        return str(text)

    def _template(self, asked: str | None, has_tools: bool) -> str:
        """The template to use: one that was asked for, by its text or name, or the model's own.

        Raises ValueError if there is none.
        """
        own = self.chat_template
        by_name = own if isinstance(own, Mapping) else {"default": own}
        if asked is not None:
            return by_name.get(asked) or asked
        name = "tool_use" if has_tools and "tool_use" in by_name else "default"
        found = by_name.get(name)
        if found is None:
            raise ValueError("the model has no chat template, or several and no default one")
        return found

    @cached_property
    def _literal(self) -> Tokenizer:
        """The same tokenizer, to which the text of a special token is text."""
        backend = _sharing_the_vocabulary(self.backend_tokenizer)
        backend.encode_special_tokens = True
        return backend


def _sharing_the_vocabulary(backend: Tokenizer) -> Tokenizer:
    """A copy whose model is the original's own, unless its added tokens would get other ids."""
    added = backend.get_added_tokens_decoder()
    copied = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(copied, part, getattr(backend, part))
    copied.add_tokens([added[token_id] for token_id in sorted(added)])
    if _ids(copied) == _ids(backend):
        return copied
    return copy.deepcopy(backend)


def _ids(backend: Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
