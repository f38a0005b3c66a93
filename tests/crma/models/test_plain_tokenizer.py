"""crma.models.plain_tokenizer against transformers: the same tokens, texts and renderings."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
from families import FAMILIES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from crma.models.chat_template import PARAMETERS, encode_chat
from crma.models.plain_tokenizer import PlainTokenizer, for_another_thread
from crma.models.prompts import Conversation, Turn

FRAGMENTS = (
    " ",
    "\n\n",
    "the",
    " café",
    "日本",
    "🙂",
    "12 345",
    "user",
    "<think>",
    "<|",
    "|>",
    "▁",
)
QUESTION = [{"role": "user", "content": "the"}]


@cache
def plain(name: str) -> PlainTokenizer:
    """The plain tokenizer of a family."""
    return of(tokenizer_of(name))


def of(theirs: PreTrainedTokenizerFast) -> PlainTokenizer:
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    template = theirs.chat_template
    return PlainTokenizer(backend, theirs.special_tokens_map, theirs.all_special_tokens, template)


def texts(name: str) -> st.SearchStrategy[str]:
    fragments = st.sampled_from((*FRAGMENTS, *FAMILIES[name].special)) | st.text(max_size=3)
    return st.lists(fragments, max_size=8).map("".join)


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> str:
    """The text; or the words with which the template refuses."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_texts_and_tokens_are_those_of_transformers(name: str, data: st.DataObject) -> None:
    ours, theirs = plain(name), tokenizer_of(name)
    text = data.draw(texts(name))
    for added in (True, False):
        for split in (True, False):
            options = {"add_special_tokens": added, "split_special_tokens": split}
            ids = ours.encode(text, **options)
            assert ids == theirs.encode(text, **options)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    for skip in (True, False):
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_templates_render_as_with_transformers(name: str, data: st.DataObject) -> None:
    roles = data.draw(
        st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1)
    )
    messages = [{"role": role, "content": data.draw(texts(name)), "name": None} for role in roles]
    more: dict[str, Any] = {"add_generation_prompt": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        more["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    if data.draw(st.booleans()):
        more |= {"enable_thinking": False, "documents": [{"title": "a", "text": "b"}]}
    if data.draw(st.booleans()):
        messages[-1]["reasoning"] = "since"
    assert rendered(plain(name), messages, **more) == rendered(tokenizer_of(name), messages, **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_known_of_tokens_is_that_of_transformers(name: str) -> None:
    ours, theirs = plain(name), tokenizer_of(name)
    for attribute in ("eos_token", "bos_token", "eos_token_id", "special_tokens_map"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    for token in ("the", "<|im_end|>", "no such token"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)


@pytest.mark.parametrize("template", [
    "{{ messages[0].content | tojson(indent=1) }}",
    "{{ messages[0].tool_calls }}{{ messages[0].content.upper() }}{{ eos_token }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% if %}",
])  # fmt: skip
def test_a_template_may_do_what_it_may_with_transformers_and_no_more(template: str) -> None:
    ours, theirs = plain("smollm2"), tokenizer_of("smollm2")
    found, expected = (rendered(each, QUESTION, chat_template=template) for each in (ours, theirs))
    assert found == expected


def test_the_server_gives_templates_what_transformers_takes() -> None:
    """Otherwise a client could set one of them as a variable."""
    method = PreTrainedTokenizerFast.apply_chat_template
    assert {"self", *PARAMETERS} == set(inspect.signature(method).parameters)


@pytest.mark.parametrize("asked", [None, "default", "tool_use", "{{ 1 }}"])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_of_several_templates_the_same_is_taken(asked: str | None, tools: Any) -> None:
    theirs = copy.deepcopy(tokenizer_of("smollm2"))
    for templates in ({"default": "d", "tool_use": "t"}, {"default": "d"}, {"other": "o"}, None):
        theirs.chat_template = templates
        found, expected = (
            rendered(each, QUESTION, chat_template=asked, tools=tools)
            for each in (of(theirs), theirs)
        )
        assert found.partition(":")[0] == expected.partition(":")[0]


def test_a_conversation_has_the_tokens_that_it_has_with_transformers_tokenizer() -> None:
    """Special tokens that a message spells are text: that takes a copy with other names."""
    turns = (
        Turn("user", "the <|im_end|> of"),
        Turn("assistant", "<|im_start|>"),
        Turn("user", "x"),
    )
    for name in ("smollm2", "qwen3"):
        ours = encode_chat(plain(name), Conversation(turns))
        assert ours == encode_chat(tokenizer_of(name), Conversation(turns))


def test_threads_share_one_and_its_vocabulary_is_there_once() -> None:
    ours, theirs = plain("qwen3"), tokenizer_of("qwen3")
    assert for_another_thread(ours) is ours
    assert for_another_thread(theirs) is not theirs
    asked = [(f"the <|im_end|> {i} " * 50, i % 2 == 0) for i in range(64)]
    expected = [theirs.encode(text, split_special_tokens=split) for text, split in asked]
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(ours.encode, each, split_special_tokens=s) for each, s in asked]
        assert [each.result() for each in running] == expected


def test_added_tokens_whose_ids_have_gaps_keep_them() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    described = backend.to_str().replace(
        '"added_tokens":[]',
        '"added_tokens":[{"id":7,"content":"<e>","single_word":false,"lstrip":false,'
        '"rstrip":false,"normalized":false,"special":true}]',
    )
    ours = PlainTokenizer(Tokenizer.from_str(described), {"eos_token": "<e>"}, ["<e>"], None)
    assert ours.encode("<e>") == [ours.eos_token_id]
    assert ours.eos_token_id not in ours.encode("<e>", split_special_tokens=True)
    assert ours.encode("a", split_special_tokens=True) == [0]


def test_a_copy_that_gets_tokens_leaves_the_original_alone() -> None:
    ours = plain("smollm2")
    before = ours.encode("[x]the", split_special_tokens=True)
    other = copy.deepcopy(ours)
    assert other.add_tokens([AddedToken("[x]")]) == 1
    assert other.encode("[x]", split_special_tokens=True) == [other.convert_tokens_to_ids("[x]")]
    assert ours.encode("[x]the", split_special_tokens=True) == before
    assert "[x]" not in ours.get_vocab()


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenize"):
        plain("smollm2").apply_chat_template(QUESTION, tokenize=True)
    with pytest.raises(ValueError, match="clean_up"):
        plain("smollm2").decode([1], clean_up_tokenization_spaces=True)
