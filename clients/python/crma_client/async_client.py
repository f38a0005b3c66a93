"""`AsyncClient`: the calls of `Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.chats import ChatReader
from crma_client.client import DEFAULT_URL
from crma_client.errors import ConnectionFailed, CrmaClientError
from crma_client.job_events import POLL_S, ProgressReader
from crma_client.streams import AsyncTokenStream, TokenReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import date
    from os import PathLike

    from typing_extensions import Unpack

    from crma_client.calls import ChatOptions, GenerateOptions
    from crma_client.chats import Chat
    from crma_client.job_events import OnProgress
    from crma_client.types import Generation


class AsyncClient(AsyncConnection):
    """An async client of one CRMA Server.

    Use it as an async context manager, or call `aclose()`. Its methods are those of `Client`,
    awaited; `Client` documents their arguments, results and errors.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        retries: int = 2,
        **http: Any,
    ) -> None:
        """Take the arguments of `Client`; `http` are further arguments of `httpx.AsyncClient`."""
        super().__init__(base_url, api_key, timeout, retries, **http)

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

    async def ablation(self, **body: Any) -> dict[str, Any]:
        """Compare variants on a question set; see `Client.ablation` for the arguments."""
        response = await self._send("POST", "/ablation", calls.write_body(body))
        return calls.read_object(response)

    async def ablation_jobs(self) -> list[Any]:
        """List the background jobs of your key, newest first, without requests and results."""
        response = await self._send("GET", "/ablation")
        return calls.read_list(response)

    async def run_ablation(
        self, on_progress: OnProgress | None = None, **body: Any
    ) -> dict[str, Any]:
        """Run an ablation as a background job, and wait for its report; see `Client.run_ablation`.

        Cancelling the task that waits cancels the job.
        """
        started = await self.ablation(**{**body, "background": True})
        id = str(started["id"])
        try:
            return await self.wait_for_ablation(id, on_progress)
        except CrmaClientError as error:
            error.value = error.value or id
            raise
        except BaseException:
            with suppress(CrmaClientError):
                await self.cancel_ablation(id)
            raise

    async def wait_for_ablation(
        self, id: str, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Wait for the report of a background job; see `Client.run_ablation`."""
        while True:
            # After a lost connection the job is asked for, which may raise.
            with suppress(ConnectionFailed):
                async with aclosing(self._progress(id)) as progress:
                    async for done, total in progress:
                        if on_progress is not None:
                            on_progress(done, total)
            result = calls.job_result(await self.ablation_job(id))
            if result is not None:
                return result
            await asyncio.sleep(POLL_S)

    async def _progress(self, id: str) -> AsyncGenerator[tuple[int, int]]:
        """Yield (done, total) of a job until its events end."""
        reader = ProgressReader()
        async with self._opened("GET", calls.events_path(id)) as response:
            with calls.transport_errors():
                async for chunk in response.aiter_bytes():
                    for progress in reader.feed(chunk):
                        yield progress

    async def ablation_job(self, id: str) -> dict[str, Any]:
        """Get the status, progress and request of a background job and, once done, its result."""
        response = await self._send("GET", calls.ablation_path(id))
        return calls.read_object(response)

    async def cancel_ablation(self, id: str) -> dict[str, Any]:
        """Cancel a background job if it is still running; its record stays."""
        response = await self._send("DELETE", calls.ablation_path(id))
        return calls.read_object(response)

    async def question_sets(self) -> list[Any]:
        """List name, digest, number of items and source of the question sets that you may ask."""
        response = await self._send("GET", "/question_sets")
        return calls.read_list(response)

    async def upload_question_set(self, name: str, lines: bytes) -> dict[str, Any]:
        """Store a question set, given as JSON Lines, for your key; an admin's is for every key."""
        response = await self._send("PUT", calls.question_set_path(name), lines)
        return calls.read_object(response)

    async def delete_question_set(self, name: str) -> dict[str, Any]:
        """Delete a question set that you uploaded."""
        response = await self._send("DELETE", calls.question_set_path(name))
        return calls.read_object(response)

    async def adapters(self) -> dict[str, Any]:
        """List the base model, the CRMA backbone and the task adapters that the server serves."""
        response = await self._send("GET", "/adapters")
        return calls.read_object(response)

    async def upload_adapter(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        licence: str | None = None,
        trust_base: bool = False,
        prompt_format: str | None = None,
    ) -> dict[str, Any]:
        """Publish a PEFT LoRA from a folder; see `Client.upload_adapter`."""
        trusted = "true" if trust_base else None
        fields = {"name": name, "licence": licence, "trust_base": trusted}
        fields["prompt_format"] = prompt_format
        with calls.upload_form(folder, fields) as form:
            response = await self._send("POST", "/adapters", **form)
        return calls.read_object(response)

    async def delete_adapter(self, task: str) -> dict[str, Any]:
        """Delete a version, `name@version`, or all of a task that no longer serves. Needs the admin
        key.
        """
        response = await self._send("DELETE", calls.adapter_path(task))
        return calls.read_object(response)

    async def tokenize(self, prompt: str | None = None, **body: Any) -> dict[str, Any]:
        """Encode a prompt or a conversation; see `Client.tokenize`."""
        content = calls.write_body({"prompt": prompt, **body})
        response = await self._send("POST", "/tokenize", content=content)
        return calls.read_object(response)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        content = calls.write_body({"tokens": list(tokens)})
        response = await self._send("POST", "/detokenize", content=content)
        return str(calls.read_object(response)["prompt"])

    async def usage(
        self,
        first_day: date | str | None = None,
        last_day: date | str | None = None,
        *,
        key: str | None = None,
        task: str | None = None,
        by: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Sum up the tokens that keys have used; see `Client.usage` for the arguments."""
        days = {"from": first_day, "to": last_day}
        path = calls.query_path("/usage", {**days, "key": key, "task": task, "by": by})
        response = await self._send("GET", path)
        return calls.read_object(response)

    async def audit(
        self,
        *,
        limit: int | None = None,
        before: int | None = None,
        who: str | None = None,
        what: str | None = None,
    ) -> list[Any]:
        """List what administrators did; see `Client.audit` for the arguments."""
        fields = {"limit": limit, "before": before, "who": who, "what": what}
        response = await self._send("GET", calls.query_path("/audit", fields))
        return calls.read_list(response)

    async def health(self) -> bool:
        """Whether the server process is alive."""
        response = await self._send("GET", "/healthz", accepted=[503])
        return calls.read_probe(response)

    async def ready(self) -> bool:
        """Whether the server accepts requests: False while it starts or drains."""
        response = await self._send("GET", "/readyz", accepted=[503])
        return calls.read_probe(response)

    async def metrics(self) -> str:
        """Get the server's metrics in the Prometheus text format."""
        response = await self._send("GET", "/metrics")
        return calls.read_text(response)
