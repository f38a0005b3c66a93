"""From a validated request to the engine: resolve its adapters, check it, encode it."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from crma.models.prompts import TemplateFormat
from crma.models.tools import ToolMarkup, tool_markup
from server import __version__
from server.engine.inference_engine import InferenceEngine
from server.engine.request import Constraint, Request, SamplingParams
from server.records.database import Database
from server.service.audit import Audit, AuditLog
from server.service.caller import Caller
from server.service.errors import (
    DeadlineExceeded,
    Draining,
    InvalidField,
    NotReady,
    RequestTooLarge,
)
from server.service.generation import Generation
from server.service.keys import Keys
from server.service.metrics import Metrics
from server.service.outcome import Outcome
from server.service.promoter import Promoter
from server.service.prompt_encoder import Prompt, PromptEncoder
from server.service.publisher import Publisher
from server.service.quotas import Quotas
from server.service.registry import Registry, Resolved
from server.service.telemetry import Telemetry
from server.service.token_texts import TokenTexts
from server.service.usage import Usage
from server.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

COLD = "the engine has not passed its first steps yet"


@dataclass(eq=False)
class Frontend:
    """What every generating route needs. An app has one, in `app.state.frontend`.

    Args:
        engine: running.
        registry: not started; the app starts and stops it.
        tokenizer: used by nobody else.
        metrics: those of `registry`.
        telemetry: None: traces are off.

    Attributes:
        keys: who may send requests.
        quotas: how much they have used of their limits, here.
        database: the records; the app closes it.
        usage: how much they have used, by day.
        audit: what administrators did.
        draining: the server stops and takes no new requests.
        is_warm: the engine's first steps have passed, and on vLLM its self-check.
        failure: why the server cannot start, if it cannot.
    """

    settings: Settings
    engine: InferenceEngine
    registry: Registry
    tokenizer: PreTrainedTokenizerBase
    metrics: Metrics
    telemetry: Telemetry | None = None
    draining: bool = False
    is_warm: bool = False
    failure: str | None = None

    def __post_init__(self) -> None:
        self.model = self.engine.model
        max_queue = self.settings.max_queue
        max_model_len = self.model.max_model_len
        self.encoder = PromptEncoder(
            self.tokenizer, self.model.num_tokens, max_queue, max_model_len
        )
        url = self.settings.database_url
        self.database = Database(
            self.settings.evaluations, None if url is None else url.get_secret_value()
        )
        self.usage = Usage(self.database, self.settings.usage_flush_s, self.metrics)
        self.audit = Audit(AuditLog(self.settings.audit_log), self.database, self.metrics)
        self.registry.on_changes = self.audit.note_changes
        self.keys = Keys(self.settings, self.audit)
        self.quotas = Quotas()
        self.texts = TokenTexts(self.tokenizer)
        self._builder = ThreadPoolExecutor(1, "build")
        self.publisher = Publisher(self.registry, self.engine, self.settings.request_timeout_s)
        self.promoter = Promoter(self.registry)

    def resolve(
        self,
        task: str | None,
        crma: bool | None,
        crma_version: str | None = None,
        *,
        caller: Caller,
    ) -> Resolved:
        """The adapters of a request. Raises NotReady, Draining, and what the registry raises."""
        self.check_ready()
        return self.registry.resolve(task, crma, crma_version, caller)

    def check_ready(self) -> None:
        """Raises NotReady or Draining if the server takes no requests now."""
        if self.draining:
            raise Draining("the server is stopping and takes no new requests")
        if not self.registry.verified:
            raise NotReady("the adapter store is not verified yet; try again")
        if not self.is_warm:
            raise NotReady(f"{COLD}; try again")

    def check(
        self,
        resolved: Resolved,
        sampling: SamplingParams,
        timeout_s: float | None,
        *,
        needs_format: bool,
    ) -> None:
        """Check a request against this server's limits.

        Raises:
            InvalidField: n, stop or timeout_s over its limit, a token id that does not exist, or a
                prompt that needs a prompt format where the model has none.
            RequestTooLarge: as `check_room`.
        """
        limits = (
            ("n", sampling.n, self.settings.max_n),
            ("stop", len(sampling.stop), self.settings.max_stop),
            ("timeout_s", timeout_s or 0, self.settings.request_timeout_s),
        )
        for name, value, limit in limits:
            if value > limit:
                message = f"{name}: over the limit"
                raise InvalidField(message, field=name, value=value, allowed=f"<= {limit}")
        self._check_token_ids(sampling)
        self.check_room(sampling.n, field="n")
        if needs_format and resolved.prompt_format is None:
            message = 'the base model has no chat template: send a raw prompt, "raw": true'
            raise InvalidField(message, field="raw", value=False, allowed=True)

    def tool_markup(self, resolved: Resolved) -> ToolMarkup:
        """How calls of functions are written in a conversation with these adapters.

        Raises ConfigError as the function of that name.
        """
        trained = resolved.prompt_format
        template = trained.template if isinstance(trained, TemplateFormat) else None
        return tool_markup(self.tokenizer, template)

    def check_room(self, num_sequences: int, *, field: str) -> None:
        """Raises RequestTooLarge for more sequences than may run and wait at once."""
        room = self.settings.max_num_seqs + self.settings.max_queue
        if num_sequences > room:
            message = f"{field}: {num_sequences} answers are more than this server has room for"
            allowed = f"n x prompts <= {room}"
            raise RequestTooLarge(message, field=field, value=num_sequences, allowed=allowed)

    def _check_token_ids(self, sampling: SamplingParams) -> None:
        """Raises InvalidField that names the first token id out of range."""
        num_tokens = self.model.num_tokens
        biased = [(f"logit_bias.{token_id}", token_id) for token_id, _ in sampling.logit_bias]
        ending = [(f"stop_token_ids.{i}", each) for i, each in enumerate(sampling.stop_token_ids)]
        for field, token_id in biased + ending:
            if not 0 <= token_id < num_tokens:
                message = f"{field}: no such token"
                allowed = f"0 to {num_tokens - 1}"
                raise InvalidField(message, field=field, value=token_id, allowed=allowed)

    async def generation(
        self,
        prompt: Prompt,
        resolved: Resolved,
        sampling: SamplingParams,
        *,
        raw: bool = False,
        fills_context: bool = False,
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
        prefix: str = "gen",
        answer: str | None = None,
        interactive: bool = True,
        prompt_name: str = "prompt",
    ) -> Generation:
        """A request, encoded and not yet submitted.

        A sampled request without a seed gets one, so that it can be repeated.

        Args:
            prompt: text goes through the prompt format of `resolved` unless `raw`.
            fills_context: generate up to the end of the context, whatever `sampling.max_tokens`.
            add_special_tokens: raw text gets those that the tokenizer adds, such as a start token.
            prefix: of the request's id.
            answer: a given answer; the log-probabilities of its tokens become `prompt_logprobs`.
            interactive: False: it may be preempted by requests that are.
            prompt_name: as in `PromptEncoder.encode`.

        Raises:
            InvalidField: as `check`; a token id of the prompt that does not exist; or more
                min_tokens than max_tokens.
            ConfigError: the chat template refuses these turns.
            InvalidConstraint: the engine cannot honour the constraint.
            TextTooLong: the prompt cannot fit the model's context.
            QueueFull: `max_queue` prompts wait to be encoded, or constraints wait to be checked.
            DeadlineExceeded: it has waited for that until its deadline.
        """
        arrival = time.monotonic()
        deadline = arrival + (timeout_s or self.settings.request_timeout_s)
        needs_format = isinstance(prompt, str) and not raw
        self.check(resolved, sampling, timeout_s, needs_format=needs_format)
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))
        if sampling.constraint is not None:
            await self._check_constraint(sampling.constraint, deadline)
        encoded = await self.encoder.encode(
            prompt,
            resolved.prompt_format,
            raw=raw,
            add_special_tokens=add_special_tokens,
            answer=answer,
            prompt_name=prompt_name,
            owner=resolved.caller.name,
            deadline=deadline,
            has_to_fit=True,
        )
        if answer is not None:
            first = len(encoded.prompt_ids)
            sampling = replace(sampling, prompt_logprobs=0, prompt_logprobs_from=first)
        if fills_context:
            num_left = self.model.max_model_len - len(encoded.prompt_ids)
            sampling = replace(sampling, max_tokens=max(1, num_left))
        _check_min_tokens(sampling)
        request = Request(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompt_ids=encoded.prompt_ids + encoded.answer_ids,
            stop_token_ids=(encoded.stop_id,),
            sampling=sampling,
            selection=resolved.selection,
            arrival=arrival,
            deadline=deadline,
            interactive=interactive,
            owner=resolved.caller.name,
            cache_salt=resolved.caller.cache_salt,
        )
        own_deadline = timeout_s is not None and timeout_s < self.settings.request_timeout_s
        return self._not_submitted(request, resolved, own_deadline=own_deadline)

    def _not_submitted(
        self, request: Request, resolved: Resolved, *, own_deadline: bool
    ) -> Generation:
        """A request with its labels in the metrics. `own_deadline`: its client chose that."""
        task = resolved.task.name if resolved.task else None
        crma = "off" if resolved.selection.crma_digest is None else "on"
        return Generation(
            self.engine,
            request,
            self.metrics,
            (self.metrics.adapter_label(task), crma),
            partial(self._count, resolved.caller),
            task=task,
            own_deadline=own_deadline,
            telemetry=self.telemetry,
        )

    def _count(self, caller: Caller, outcome: Outcome) -> None:
        """Count what a request has used that ends now."""
        self.quotas.spend(caller, outcome.num_tokens)
        self.usage.count(caller.name, outcome)

    async def _check_constraint(self, constraint: Constraint, deadline: float) -> None:
        """Raises InvalidConstraint, QueueFull or DeadlineExceeded."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self.engine.check(constraint)
        except TimeoutError as error:
            message = "the request's deadline passed before its constraint was compiled"
            raise DeadlineExceeded(message, field="timeout_s") from error

    def provenance(self, seed: int | None, crma: str | None, **tasks: Any) -> dict[str, Any]:
        """Exactly what answered.

        Args:
            crma: digest of the backbone; None: off.
            tasks: the digest, or the digests by name, of the task adapters.
        """
        return {
            "base": self.model.digest,
            **tasks,
            "crma": crma,
            "engine": __version__,
            "dtype": self.model.dtype,
            "seed": seed,
        }

    def not_ready(self) -> str | None:
        """Why this server should get no requests now; None if it should."""
        stats = self.engine.stats()
        if self.failure is not None:
            return f"the server cannot start: {self.failure}"
        if stats.has_failed:
            return f"the engine has failed ({stats.failure}); restart the server"
        if self.draining:
            return "stopping"
        if not self.registry.verified:
            return "the adapter store is not verified yet"
        return None if self.is_warm else COLD

    async def stop(self) -> None:
        """End every request that still waits or runs: it raises one of STOPPING (`errors.py`)."""
        self.draining = True
        self.encoder.close()
        await self.engine.close()

    async def build(self, build: Callable[[], T]) -> T:
        """The result of work that would hold up the event loop.

        One thread does it for all: many would share the interpreter's lock, and leave the event
        loop little of it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._builder, build)

    async def close(self) -> None:
        """Write what is left to be written, and end the threads. No request runs any more."""
        self.encoder.close()
        self._builder.shutdown(wait=False, cancel_futures=True)
        await self.usage.stop()
        await self.audit.stop()
        await asyncio.to_thread(self.database.close)


def _check_min_tokens(sampling: SamplingParams) -> None:
    """Raises InvalidField if an answer cannot have as many tokens as it has to."""
    if sampling.min_tokens > sampling.max_tokens:
        message = "min_tokens: more than max_tokens"
        allowed = f"<= {sampling.max_tokens}"
        raise InvalidField(message, field="min_tokens", value=sampling.min_tokens, allowed=allowed)
