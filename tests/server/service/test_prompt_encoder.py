"""server.service.prompt_encoder: text, token ids and turns become token ids, a few at a time."""

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
from tiny import FORMAT
from tiny_configs import VOCAB
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from crma.core.errors import ConfigError
from crma.models.prompts import Conversation, Turn
from server.engine.errors import PromptTooLong, QueueFull
from server.service.errors import DeadlineExceeded, Draining, InvalidField
from server.service.prompt_encoder import SHORT, EncodedPrompt, PromptEncoder

START = "<|im_start|>"
MARKUP = "<|im_end|>"  # a special token; where a user writes it, it is text
STOP_ID = tiny.tokenizer().eos_token_id


class PausedTokenizer:
    """The tiny tokenizer, which encodes only while `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(tiny.tokenizer(), name)

    def __deepcopy__(self, _: Any) -> "PausedTokenizer":
        return self

    def encode(self, *arguments: Any, **options: Any) -> list[int]:
        assert self.go.wait(10)
        return tiny.tokenizer().encode(*arguments, **options)


@pytest.fixture
def make() -> Iterator[Callable[..., PromptEncoder]]:
    """Makes encoders and closes them."""
    made: list[PromptEncoder] = []

    def start(
        tokenizer: Any = None,
        *,
        num_tokens: int = VOCAB,
        max_waiting: int = 4,
        max_model_len: int = 128,
    ) -> PromptEncoder:
        encoder = PromptEncoder(
            tokenizer or tiny.tokenizer(), num_tokens, max_waiting, max_model_len
        )
        made.append(encoder)
        return encoder

    yield start
    for encoder in made:
        encoder.close()


async def encode(
    encoder: PromptEncoder,
    prompt: Any,
    *,
    raw: bool = False,
    answer: str | None = None,
    **more: Any,
) -> EncodedPrompt:
    return await encoder.encode(prompt, FORMAT, raw=raw, answer=answer, **more)


def as_text(token_ids: tuple[int, ...]) -> str:
    return tiny.tokenizer().decode(list(token_ids))


async def test_text_goes_through_the_prompt_format_unless_it_is_raw(make: Any) -> None:
    encoder = make()
    formatted = await encode(encoder, "the café")
    raw = await encode(encoder, "the café", raw=True)
    assert as_text(formatted.prompt_ids) == "<|im_start|>the café[answer]"
    assert as_text(raw.prompt_ids) == "the café"
    assert formatted.stop_id == raw.stop_id == STOP_ID


async def test_a_special_token_written_in_text_stays_text_unless_it_is_raw(make: Any) -> None:
    encoder = make()
    formatted = await encode(encoder, MARKUP, answer=MARKUP)
    raw = await encode(encoder, MARKUP, raw=True, answer=MARKUP)
    assert STOP_ID not in formatted.prompt_ids
    assert raw.prompt_ids == (STOP_ID,)
    for encoded in (formatted, raw):
        assert STOP_ID not in encoded.answer_ids
        assert as_text(encoded.answer_ids) == MARKUP


async def test_a_chat_without_any_template_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", None)
    question = Conversation((Turn("user", "the"),))
    with pytest.raises(ConfigError, match="no chat template"):
        await make().encode(question, None, raw=False, answer=None)


async def test_without_a_prompt_format_text_is_raw(make: Any) -> None:
    encoded = await make().encode("the café", None, raw=False, answer=None)
    assert as_text(encoded.prompt_ids) == "the café"
    assert encoded.stop_id == STOP_ID


async def test_a_given_answer_is_encoded_apart_from_the_prompt(make: Any) -> None:
    encoder = make()
    alone = await encode(encoder, "the café")
    followed = await encode(encoder, "the café", answer="is free")
    assert alone.answer_ids == ()
    assert followed.prompt_ids == alone.prompt_ids
    assert as_text(followed.answer_ids) == "is free"


async def test_token_ids_pass_unchanged(make: Any) -> None:
    encoded = await encode(make(), [5, STOP_ID, VOCAB - 1])
    assert encoded.prompt_ids == (5, STOP_ID, VOCAB - 1)


@pytest.mark.parametrize("token_id", [-1, 40])
async def test_a_token_id_out_of_range_is_named_by_its_position(make: Any, token_id: int) -> None:
    encoder = make(num_tokens=40)
    with pytest.raises(InvalidField) as caught:
        await encode(encoder, [0, 39, token_id])
    assert caught.value.field == "prompt.2"
    assert caught.value.value == token_id
    assert caught.value.allowed == "0 to 39"
    assert (await encode(encoder, [0, 39])).prompt_ids == (0, 39)


async def test_text_with_a_token_that_the_model_has_no_row_for_is_refused_by_name(
    make: Any,
) -> None:
    """An added token, of which the embedding knows nothing, failed the step of its neighbours."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["<new>"])
    encoder = make(tokenizer)
    with pytest.raises(InvalidField) as caught:
        await encode(encoder, "the café <new>", raw=True)
    assert (caught.value.field, caught.value.value) == ("prompt", "<new>")
    assert caught.value.allowed == f"text whose token ids are below {VOCAB}"
    assert (await encode(encoder, "the café", raw=True)).prompt_ids


async def test_turns_go_through_the_chat_template(make: Any) -> None:
    turns = (Turn("system", "the café"), Turn("user", f"is free{MARKUP}"))
    encoded = await encode(make(), Conversation(turns))
    assert as_text(encoded.prompt_ids) == (
        "<|im_start|>system\nthe café<|im_end|>\n"
        "<|im_start|>user\nis free<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encoded.prompt_ids.count(STOP_ID) == 2  # the template's own, not the user's


async def test_turns_that_the_template_refuses_are_a_config_error_and_free_the_place(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make(max_waiting=0)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.tokenizer(), "chat_template", "{{ raise_exception('no turns') }}")
        with pytest.raises(ConfigError, match="no turns") as caught:
            await encode(encoder, Conversation((Turn("user", "the"),) * 2))
    assert caught.value.field == "messages"
    assert as_text((await encode(encoder, "the", raw=True)).prompt_ids) == "the"


async def test_one_more_than_max_waiting_is_refused_and_the_others_are_encoded(make: Any) -> None:
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer, max_waiting=2)
    tokenizer.go.clear()
    words = ("the", "café", "is", "so")
    accepted = [asyncio.create_task(encode(encoder, text)) for text in words]
    await asyncio.sleep(0)  # each takes its place: two are encoded, two wait
    with pytest.raises(QueueFull) as caught:
        await encode(encoder, "free")
    assert caught.value.allowed == 2
    assert caught.value.retry_after >= 1
    tokenizer.go.set()
    encoded = await asyncio.gather(*accepted)
    texts = [as_text(each.prompt_ids) for each in encoded]
    assert texts == [f"<|im_start|>{text}[answer]" for text in words]
    assert (await encode(encoder, "free")).prompt_ids != ()


def test_the_text_of_tokens_shows_special_tokens_and_incomplete_characters(make: Any) -> None:
    encoder = make()
    first_byte = tiny.tokenizer().encode("本")[:1]
    assert encoder.text([STOP_ID, *tiny.tokenizer().encode(" café")]) == f"{MARKUP} café"
    assert encoder.text(first_byte) == "�"


@pytest.fixture
def with_bos() -> Any:
    """The tiny tokenizer, which also puts a start token before a text."""
    backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, backend.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=MARKUP)


async def test_a_raw_prompt_begins_with_the_start_token_unless_it_is_left_out(
    make: Callable[..., PromptEncoder], with_bos: Any
) -> None:
    encoder = make(with_bos)
    whole = await encode(encoder, "Hi", raw=True)
    bare = await encoder.encode("Hi", FORMAT, raw=True, add_special_tokens=False, answer=None)
    assert whole.prompt_ids == (with_bos.bos_token_id, *bare.prompt_ids)
    assert list(bare.prompt_ids) == tiny.tokenizer().encode("Hi", add_special_tokens=False)


# Many callers ------------------------------------------------------------------------------

LONG = "the café " * (SHORT // 8)


async def test_a_short_prompt_does_not_wait_for_long_ones(make: Any) -> None:
    """Twenty prompts of 1 MiB held a word of another key for 20.8 s."""
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer, max_waiting=8)
    encoder._lanes[1].tokenizer = tiny.tokenizer()  # only the thread for all prompts is held up
    tokenizer.go.clear()
    held_up = [asyncio.create_task(encode(encoder, LONG, owner="greedy")) for _ in range(5)]
    await asyncio.sleep(0)
    for owner in ("other", "greedy"):
        assert (await encode(encoder, "the", raw=True, owner=owner)).prompt_ids
    assert not any(task.done() for task in held_up)
    tokenizer.go.set()
    await asyncio.gather(*held_up)


async def test_owners_take_turns_with_long_prompts(make: Any) -> None:
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer, max_waiting=8)
    tokenizer.go.clear()
    ended: list[str] = []

    async def ask(owner: str) -> None:
        await encode(encoder, LONG, owner=owner)
        ended.append(owner)

    async with asyncio.TaskGroup() as group:
        for owner in ("greedy",) * 6 + ("other",) * 2:
            group.create_task(ask(owner))
            await asyncio.sleep(0)
        tokenizer.go.set()
    assert "other" in ended[:3]
    assert ended[-3:] == ["greedy"] * 3


async def test_the_owner_with_most_waiting_makes_room_for_another(make: Any) -> None:
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer, max_waiting=2)
    tokenizer.go.clear()
    greedy = [asyncio.create_task(encode(encoder, LONG, owner="greedy")) for _ in range(3)]
    await asyncio.sleep(0)  # one is encoded, two wait
    other = asyncio.create_task(encode(encoder, LONG, owner="other"))
    with pytest.raises(QueueFull):
        await greedy[-1]
    with pytest.raises(QueueFull):
        await encode(encoder, LONG, owner="other")
    tokenizer.go.set()
    assert (await other).prompt_ids
    await asyncio.gather(*greedy[:2])


async def test_a_deadline_is_kept_while_a_prompt_waits_or_is_encoded(make: Any) -> None:
    """`timeout_s: 0.5` was answered after 13.8 s."""
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer)
    tokenizer.go.clear()
    for _ in range(4):  # two are encoded; two wait, and then leave the queue
        with pytest.raises(DeadlineExceeded) as caught:
            await encode(encoder, "the", deadline=time.monotonic() + 0.02)
        assert caught.value.field == "timeout_s"
    assert len(encoder._queue) == 0
    tokenizer.go.set()
    assert (await encode(encoder, "the")).prompt_ids


async def test_a_prompt_whose_client_has_left_is_not_encoded(make: Any) -> None:
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer)
    tokenizer.go.clear()
    tasks = [asyncio.create_task(encode(encoder, LONG)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[-1].cancel()
    await asyncio.gather(tasks[-1], return_exceptions=True)
    assert len(encoder._queue) == 1
    tokenizer.go.set()
    await asyncio.gather(*tasks[:-1])


async def test_closing_ends_what_waits_and_takes_nothing_new(make: Any) -> None:
    tokenizer = PausedTokenizer()
    encoder = make(tokenizer)
    tokenizer.go.clear()
    tasks = [asyncio.create_task(encode(encoder, LONG)) for _ in range(3)]
    await asyncio.sleep(0)
    encoder.close()
    encoder.close()
    for task in tasks[1:]:
        with pytest.raises(Draining):
            await task
    with pytest.raises(Draining):
        await encode(encoder, "the")
    tokenizer.go.set()
    assert (await tasks[0]).prompt_ids  # it was being encoded


# Length ------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False])
async def test_a_text_that_cannot_fit_is_refused_unencoded(make: Any, raw: bool) -> None:
    encoder = make(PausedTokenizer(), max_model_len=4)
    encoder.tokenizer.go.clear()
    limit = encoder.limit.num_chars
    with pytest.raises(PromptTooLong) as caught:
        await encode(encoder, "x" * (limit + 1), raw=raw, has_to_fit=True)
    assert caught.value.field == "prompt"
    assert "maximum context length is 4 tokens" in caught.value.message
    assert f"<= {limit} characters" in str(caught.value.allowed)
    encoder.tokenizer.go.set()
    assert (await encode(encoder, "x" * (limit + 1), raw=raw)).prompt_ids  # to count its tokens


async def test_what_a_template_leaves_out_does_not_count(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", "{{ messages[-1].content | trim }}")
    encoder = make(max_model_len=4)
    long = " " * 10 * encoder.limit.num_chars
    conversation = Conversation((Turn("user", long), Turn("user", f"the{long}")))
    encoded = await encode(encoder, conversation, has_to_fit=True)
    assert as_text(encoded.prompt_ids) == "the"
    conversation = Conversation((Turn("user", "the"), Turn("user", "x" * len(long))))
    with pytest.raises(PromptTooLong):
        await encode(encoder, conversation, has_to_fit=True)
