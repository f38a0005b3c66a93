"""The real tokenizer of SmolLM2: chats as transformers encodes them, and the shipped formats."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import STORE
from transformers import PreTrainedTokenizerBase

from crma.models.base_model import find_base
from crma.models.chat_template import encode_chat
from crma.models.loading import load_tokenizer
from crma.models.prompts import (
    Conversation,
    PromptFormat,
    Turn,
    chat_format,
    encode_text,
)
from crma.store.adapter_store import AdapterStore

pytestmark = pytest.mark.e2e

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FRAGMENTS = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "The café",
    "日本",
    "🙂",
    "12 345",
    "user\n",
    "<|im_",
    "end|>",
)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find_base())


def conversations(*more: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    fragments = st.sampled_from((*FRAGMENTS, *more)) | st.text(max_size=5)
    texts = st.lists(fragments, max_size=6).map("".join)
    roles = st.sampled_from(["system", "user", "assistant"])
    return st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), min_size=1)


def encoded(messages: list[dict[str, Any]]) -> list[int]:
    return encode_chat(tokenizer(), Conversation(tuple(Turn(**each) for each in messages)))


@given(conversations())
@settings(deadline=None)
def test_a_chat_has_the_tokens_of_transformers(messages: list[dict[str, Any]]) -> None:
    whole = "".join(message["content"] for message in messages)
    if not any(token in whole for token in SPECIAL):
        expected = tokenizer().apply_chat_template(messages, add_generation_prompt=True)
        assert encoded(messages) == expected["input_ids"]


@given(conversations(*SPECIAL))
@settings(deadline=None)
def test_a_message_never_writes_markup(messages: list[dict[str, Any]]) -> None:
    special = set(tokenizer().all_special_ids)
    plain = [message | {"content": "x"} for message in messages]
    markup = [token for token in encoded(messages) if token in special]
    assert markup == [token for token in encoded(plain) if token in special]
    recognised = tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer().decode(encoded(messages)) == tokenizer().decode(recognised)


@pytest.mark.parametrize("task", ["medical", "legal", "finance", "science", "code"])
def test_the_shipped_formats_give_the_tokens_that_training_saw(task: str) -> None:
    """Their training encoded the text apart from the markup (decision 39)."""
    trained = AdapterStore(STORE).task(task).prompt_format
    assert trained == chat_format(tokenizer())
    assert isinstance(trained, PromptFormat)
    head, tail = (
        tokenizer().encode(each, add_special_tokens=False) for each in (trained.head, trained.tail)
    )
    for line in (STORE / "question_sets" / "public.jsonl").read_text().splitlines():
        apart = head + encode_text(tokenizer(), line) + tail
        assert trained.encode(tokenizer(), line) == apart
