"""From a validated body to the engine and back: resolve, encode, submit, collect. All generating routes go this way."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from crma.core.selection import BASE
from crma.models.prompts import PromptFormat, Turn, encode_chat, encode_text, raw_format
from server import __version__
from server.engine.errors import QueueFull
from server.engine.native.async_engine import AsyncEngine
from server.engine.request import Request, SamplingParams, TokenLogprob
from server.http.schemas import ServedModel
from server.service import errors
from server.service.generation import Generation
from server.service.metrics import Metrics
from server.service.registry import Registry, Resolved
from server.settings import Settings

Prompt = str | Sequence[int] | Sequence[Turn]


@dataclass(eq=False)
class Frontend:
    """What every generating route needs. One per app, in `app.state.frontend`.

    Args:
        engine: running already.
        registry: not started; the app starts and stops it.
        tokenizer: its own; not one that another thread uses.
        model: what the engine runs.
        metrics: the one that `registry` was given.
    """

    settings: Settings
    engine: AsyncEngine
    registry: Registry
    tokenizer: PreTrainedTokenizerBase
    model: ServedModel
    metrics: Metrics
    draining: bool = False

    def __post_init__(self) -> None:
        self._raw = raw_format(self.tokenizer)
        # One thread: a fast tokenizer is not to be used by two at once, and encoding must not hold the event loop up.
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._encoding = asyncio.Semaphore(
            self.settings.max_queue + 1
        )  # one there, and those that wait for it
        self._num_tokens = len(self.tokenizer)

    def resolve(
        self, task: str | None, crma: bool | None, crma_version: str | None = None
    ) -> Resolved:
        """The adapters of a request. Raises NotReady, Draining, and what the registry raises."""
        if self.draining:
            raise errors.Draining("the server is stopping and takes no new requests")
        if not self.registry.verified:
            raise errors.NotReady("the adapter store is not verified yet; try again")
        return self.registry.resolve(task, crma, crma_version)

    def check(
        self,
        resolved: Resolved,
        sampling: SamplingParams,
        timeout_s: float | None,
        *,
        needs_format: bool,
    ) -> None:
        """InvalidField for n, stop or timeout_s over the server's limits, or a format that there is not."""
        for name, value, limit in (
            ("n", sampling.n, self.settings.max_n),
            ("stop", len(sampling.stop), self.settings.max_stop),
            ("timeout_s", timeout_s or 0, self.settings.request_timeout_s),
        ):
            if value > limit:
                raise errors.InvalidField(
                    f"{name}: over the limit", field=name, value=value, allowed=f"<= {limit}"
                )
        if needs_format and resolved.prompt_format is None:
            message = "this model has no chat template: send raw prompts"
            raise errors.InvalidField(message, field="raw", value=False, allowed=True)

    async def generation(
        self,
        prompt: Prompt,
        resolved: Resolved,
        sampling: SamplingParams,
        *,
        raw: bool = False,
        timeout_s: float | None = None,
        prefix: str = "gen",
        answer: str | None = None,
        interactive: bool = True,
    ) -> Generation:
        """A request, not yet submitted. A sampled one without a seed gets one, so that it can be repeated.

        Args:
            prompt: text; or what needs no format: token ids, or the turns of a conversation (the chat template).
            answer: a given one, of whose tokens (`prompt_logprobs`) log-probabilities are wanted.

        Raises:
            InvalidField: as `check`; or a token id that there is not.
            ConfigError: the chat template refuses these turns.
            QueueFull: `max_queue` prompts wait to be encoded.
        """
        arrival = time.monotonic()
        self.check(resolved, sampling, timeout_s, needs_format=isinstance(prompt, str) and not raw)
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))
        prompt_ids, answer_ids, stop_id = await self._encode(
            prompt, resolved.prompt_format or self._raw, raw, answer
        )
        if answer is not None:
            sampling = replace(sampling, prompt_logprobs=0, prompt_logprobs_from=len(prompt_ids))
        request = Request(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompt_ids=prompt_ids + answer_ids,
            stop_token_ids=(stop_id,),
            sampling=sampling,
            selection=resolved.selection,
            arrival=arrival,
            deadline=arrival + (timeout_s or self.settings.request_timeout_s),
            interactive=interactive,
        )
        label = self.metrics.adapter_label(resolved.task.name if resolved.task else None)
        crma = "off" if resolved.selection.crma_digest is None else "on"
        return Generation(self.engine, request, self.metrics, (label, crma))

    async def _encode(
        self, prompt: Prompt, own: PromptFormat, raw: bool, answer: str | None
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Ids of the prompt and of a given answer, and the token that ends one, also of a prompt formatted by hand."""
        for at, each in enumerate(() if isinstance(prompt, str) else prompt):
            if isinstance(each, int) and not 0 <= each < self._num_tokens:
                name, allowed = f"prompt.{at}", f"0 to {self._num_tokens - 1}"
                raise errors.InvalidField(
                    f"{name}: no such token", field=name, value=each, allowed=allowed
                )
        if self._encoding.locked():
            raise QueueFull(self.settings.max_queue, retry_after=1.0)

        def encode() -> tuple[tuple[int, ...], tuple[int, ...], int]:
            if isinstance(prompt, str):
                ids: Sequence[Any] = (self._raw if raw else own).encode(self.tokenizer, prompt)
            else:
                turns = [each for each in prompt if isinstance(each, Turn)]
                ids = encode_chat(self.tokenizer, turns) if turns else prompt
            given = () if answer is None else encode_text(self.tokenizer, answer)
            return tuple(ids), tuple(given), own.stop_id(self.tokenizer)

        async with self._encoding:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)

    def text(self, ids: Sequence[int]) -> str:
        """Of tokens, special ones too; part of a character is shown as �."""
        # Decoding only reads the tokenizer; it need not wait for the thread that encodes.
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def top_tokens(self, logprob: TokenLogprob) -> list[dict[str, Any]]:
        """The most probable tokens as they are answered, each with its own text."""
        return [
            {"id": each, "token": self.text([each]), "logprob": value}
            for each, value in logprob.top
        ]

    def provenance(self, seed: int | None, crma: str | None, **tasks: Any) -> dict[str, Any]:
        """Exactly what answered: `tasks` is the digest, or the digests by name, of the task adapters."""
        served = {"crma": crma, "engine": __version__, "dtype": self.model.dtype, "seed": seed}
        return {"base": self.model.digest, **tasks, **served}

    def not_ready(self) -> str | None:
        """Why this server should get no requests yet, or any more; None if it should."""
        if self.draining:
            return "stopping"
        if not self.registry.verified:
            return "the adapter store is not verified yet"
        stats = self.engine.stats()
        if stats.has_failed:
            return "the engine has failed; restart the server"
        return None if stats.num_steps else "no step has run yet"

    async def warm_up(self) -> None:
        """One token of the base model: the first step, before the first user pays for it; no metric counts it."""
        generation = await self.generation(
            "Hello", Resolved(None, BASE, None), SamplingParams(1), raw=True
        )
        async for _ in self.engine.submit(generation.request):
            pass

    def close(self) -> None:
        """Ends the encoding thread."""
        self._encoder.shutdown(wait=False, cancel_futures=True)
