"""`AsyncClient`: the calls of `Client`, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from crma_client import calls
from crma_client.client import DEFAULT_URL
from crma_client.streams import AsyncTokenStream

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date
    from os import PathLike

    from typing_extensions import Self, Unpack

    from crma_client.calls import GenerateOptions
    from crma_client.types import Generation


class AsyncClient:
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
        **http: Any,
    ) -> None:
        """Take the arguments of `Client`; `http` are further arguments of `httpx.AsyncClient`."""
        headers = calls.headers(api_key)
        url = calls.server_url(base_url)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, **http)

    async def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer to a prompt; see `Client.generate` for the options."""
        response = await self._send("POST", "/generate", calls.generate_body(prompt, options))
        return calls.read_answer(response)

    @asynccontextmanager
    async def stream(
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[AsyncTokenStream]:
        """Generate an answer token by token, in an `async with` block; see `Client.stream`."""
        body = calls.generate_body(prompt, options, stream=True)
        request = self._http.build_request("POST", "/generate", content=body)
        with calls.transport_errors():
            response = await self._http.send(request, stream=True)
        async with aclosing(response):
            if response.status_code != 200:
                with calls.transport_errors():
                    await response.aread()
            yield AsyncTokenStream(calls.checked(response))

    async def ablation(self, **body: Any) -> dict[str, Any]:
        """Compare variants on a question set; see `Client.ablation` for the arguments."""
        response = await self._send("POST", "/ablation", calls.write_body(body))
        return calls.read_object(response)

    async def ablation_jobs(self) -> list[Any]:
        """List the background jobs of your key, newest first, without requests and results."""
        response = await self._send("GET", "/ablation")
        return calls.read_list(response)

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
        response = await self._send("GET", "/healthz")
        return calls.read_probe(response)

    async def ready(self) -> bool:
        """Whether the server accepts requests: False while it starts or drains."""
        response = await self._send("GET", "/readyz")
        return calls.read_probe(response)

    async def metrics(self) -> str:
        """Get the server's metrics in the Prometheus text format."""
        response = await self._send("GET", "/metrics")
        return calls.read_text(response)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(
        self, method: str, path: str, content: bytes | None = None, **form: Any
    ) -> httpx.Response:
        """Send a request and read the whole response, whatever its status."""
        with calls.transport_errors():
            return await self._http.request(method, path, content=content, **form)
