"""Answers to prompts and to conversations, whole or token by token."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.chats import ChatReader
from crma_client.connection import Connection
from crma_client.streams import AsyncTokenStream, TokenReader, TokenStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from typing_extensions import Unpack

    from crma_client.calls import ChatOptions, GenerateOptions
    from crma_client.chats import Chat
    from crma_client.types import Generation


class Answers(Connection):
    """What `Client` can be asked."""

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer to a prompt and wait for all of it.

        Args:
            prompt: the question; the server puts it into the prompt format of the task.
            task: a task adapter, as `name` or `name@version`. Default: the base model.
            crma: whether to use the CRMA backbone. Default: on exactly if the task adapter was
                trained with CRMA.
            raw: send the prompt to the model as it is, without the task's prompt format.
            format_of: put the prompt into the prompt format of this task instead, or of base.
            add_special_tokens: begin a raw prompt with the token that the tokenizer adds, if any.
                Default: true.
            max_tokens: length limit of the answer.
            min_tokens: nothing ends the answer before it has so many tokens.
            temperature: 0 is greedy.
            top_p: sample from the most probable tokens that together have this probability.
            top_k: sample from this many of the most probable tokens.
            min_p: sample from tokens with this share of the most probable token's probability.
            repetition_penalty: above 1, makes tokens of prompt and answer less probable.
            presence_penalty: subtracted from the logits of tokens that the answer has.
            frequency_penalty: the same, once for each time that the answer has them.
            logit_bias: token ids, and what is added to their logits, from -100 to 100.
            seed: seed of the sampling; choice i of n draws from seed + i.
            n: number of answers.
            structured_outputs: what the answer has to be: {"choice": texts}, {"regex": …},
                {"json": schema}, {"json_object": True} or {"grammar": …}.
            stop: one text or several, each of which ends the answer.
            stop_token_ids: tokens that end the answer.
            include_stop_str_in_output: what ends the answer is part of it.
            ignore_eos: continue to max_tokens past the end of the answer; for benchmarks.
            skip_special_tokens: special tokens have no text. Default: true.
            logprobs: return the log-probability of each token.
            top_logprobs: most probable tokens to list with each, in `raw`; needs logprobs.
            prompt_logprobs: return the log-probabilities of the prompt's tokens, in `raw`.
            timeout_s: deadline of this request on the server, in seconds.

        An option that is absent or None is not sent, and the server's default applies.

        Returns:
            The answer, with what produced it and how long it took.

        Raises:
            InvalidArgument: an option has no form in JSON.
            StatusError: the server refused the request (see its subclasses).
            ConnectionFailed: there was no complete answer.
            ProtocolError: the answer is not in the documented format.
        """
        response = self._send("POST", "/generate", calls.generate_body(prompt, options))
        return calls.read_answer(response)

    @contextmanager
    def stream(
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> Iterator[TokenStream[Generation]]:
        """Generate an answer token by token, in a `with` block; the options are `generate`'s.

        Leaving the block before the end cancels the request on the server.

        Returns:
            An iterable of tokens, whose `result` is the whole answer after the last token.

        Raises:
            GenerationFailed: while iterating, if the server fails after the stream has begun;
                otherwise as `generate`.
        """
        body = calls.generate_body(prompt, options, stream=True)
        with self._opened("POST", "/generate", body) as response:
            yield TokenStream(response, TokenReader())

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Chat:
        """Answer a conversation and wait for all of the answer.

        Args:
            messages: turns as OpenAI has them: {"role": "user", "content": "Hi"}.
            tools: functions that the model may call, as OpenAI describes them.
            tool_choice: none, auto, required, or one function.
            parallel_tool_calls: whether an answer may have several calls.
            response_format: what the answer has to be, as OpenAI says it.
            chat_template_kwargs: further variables of the chat template.

        The other options are those of `generate`; raw prompts are not chats. Without max_tokens an
        answer may fill the context.

        Raises:
            CrmaClientError: as `generate`.
        """
        body = calls.chat_body(messages, options)
        return calls.read_chat_answer(self._send("POST", "/v1/chat/completions", body))

    @contextmanager
    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> Iterator[TokenStream[Chat]]:
        """Answer a conversation token by token, in a `with` block, as `stream`; see `chat`."""
        body = calls.chat_body(messages, options, stream=True)
        with self._opened("POST", "/v1/chat/completions", body) as response:
            yield TokenStream(response, ChatReader())


class AsyncAnswers(AsyncConnection):
    """What `AsyncClient` can be asked."""

    async def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer to a prompt; see `Client.generate` for the options."""
        response = await self._send("POST", "/generate", calls.generate_body(prompt, options))
        return calls.read_answer(response)

    @asynccontextmanager
    async def stream(
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[AsyncTokenStream[Generation]]:
        """Generate an answer token by token, in an `async with` block; see `Client.stream`."""
        body = calls.generate_body(prompt, options, stream=True)
        async with self._opened("POST", "/generate", body) as response:
            yield AsyncTokenStream(response, TokenReader())

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> Chat:
        """Answer a conversation; see `Client.chat` for the options."""
        body = calls.chat_body(messages, options)
        return calls.read_chat_answer(await self._send("POST", "/v1/chat/completions", body))

    @asynccontextmanager
    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> AsyncIterator[AsyncTokenStream[Chat]]:
        """Answer a conversation token by token, in an `async with` block; see `Client.chat`."""
        body = calls.chat_body(messages, options, stream=True)
        async with self._opened("POST", "/v1/chat/completions", body) as response:
            yield AsyncTokenStream(response, ChatReader())
