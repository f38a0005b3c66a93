"""Constraints on answers: each is compiled once, and each of its sequences follows the grammar.

llguidance, which releases the interpreter's lock, does the work in other threads: it compiles in
one, and computes which tokens are allowed in others, from the moment that a sequence's newest token
is known. The engine's thread waits only where it samples, after the next forward pass.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import secrets
import threading
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from numpy import typing as npt
from torch import Tensor

from crma.models.json_schema import JSON_STYLE, closed
from server.engine.errors import InvalidConstraint, QueueFull
from server.engine.request import Constraint, ConstraintKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With these the worst that a source can ask for takes about a second to compile, and about 30 ms to
# compute the tokens of a step from.
MAX_SOURCE = 65_536  # characters
LIMITS = LLParserLimits(
    max_grammar_size=10_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
MASK_SECONDS = 5.0  # a row whose allowed tokens take longer to compute ends
MAX_WAITING = 16  # constraints that may wait to be compiled
NUM_COMPILED = 64  # constraints that are kept
NUM_THREADS = min(4, os.cpu_count() or 1)  # that compute allowed tokens
STACK_BYTES = 256 << 20  # of virtual memory: a grammar of 10,000 symbols may nest as deep
CANNOT_GO_ON = "the answer cannot go on under its constraint"
MAX_REASON = 300  # characters of a reason that are shown

_FORMATS: dict[ConstraintKind, Literal["json_schema", "regex", "choice", "grammar"]] = {
    ConstraintKind.JSON_SCHEMA: "json_schema",
    ConstraintKind.REGEX: "regex",
    ConstraintKind.CHOICE: "choice",
    ConstraintKind.GRAMMAR: "grammar",
}


class Stuck(Exception):
    """A sequence has no next token under its constraint; the message says why."""


class Constraints:
    """The constraints of one model.

    Args:
        tokenizer: a fast tokenizer.
        end_ids: tokens that end every sequence (the model's own).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._end_ids = end_ids
        self._compile_thread = _DeepThreads(1, "compile")
        self._mask_threads = _DeepThreads(NUM_THREADS, "mask")
        self._compiled = lru_cache(NUM_COMPILED)(self._start_compiling)
        self._num_waiting = 0

    async def check(self, constraint: Constraint) -> None:
        """Compile a constraint, unless that was done before.

        Raises:
            InvalidConstraint: it cannot be compiled.
            QueueFull: MAX_WAITING others are being compiled.
        """
        length = len(constraint.source)
        if length > MAX_SOURCE:
            message = f"{constraint.field}: over {MAX_SOURCE} characters"
            allowed = f"<= {MAX_SOURCE} characters"
            raise InvalidConstraint(message, field=constraint.field, value=length, allowed=allowed)
        if self._num_waiting >= MAX_WAITING:
            raise QueueFull(MAX_WAITING, retry_after=1.0)
        self._num_waiting += 1
        try:
            # Shielded: another request may wait for the same one.
            await asyncio.shield(asyncio.wrap_future(self._compiled(constraint)))
        except ValueError as error:
            message = f"{constraint.field}: {error}"
            value = constraint.source[:MAX_REASON]
            allowed = f"a {constraint.kind} that can be satisfied"
            raise InvalidConstraint(
                message, field=constraint.field, value=value, allowed=allowed
            ) from error
        finally:
            self._num_waiting -= 1

    def matcher(
        self, constraint: Constraint, end_ids: frozenset[int], *, ignore_eos: bool
    ) -> Matcher:
        """Begin a sequence.

        Args:
            constraint: one that was checked.
            end_ids: tokens that end the sequence.
            ignore_eos: as in `SamplingParams`.
        """
        compiled = self._compiled(constraint)
        return Matcher(self._mask_threads, compiled, end_ids, ignore_eos=ignore_eos)

    def close(self) -> None:
        """End the threads."""
        for threads in (self._compile_thread, self._mask_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Takes seconds; used in the compiling thread only."""
        return _inert_tokenizer(self._hf_tokenizer, self._end_ids)

    def _start_compiling(self, constraint: Constraint) -> Future[LLMatcher]:
        return self._compile_thread.submit(self._compile, constraint)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        """Raises ValueError: the constraint is none, or no token can begin an answer."""
        try:
            tokenizer = self._tokenizer
        except Exception as error:
            raise ValueError(f"this model's tokenizer is not supported: {error}") from error
        matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=LIMITS)
        _raise_fault(matcher)
        matcher.compute_logit_bias()
        _raise_fault(matcher)
        return matcher


class Matcher:
    """Which tokens may come next in one sequence.

    Args:
        threads: compute it.
        compiled: the constraint.
        end_ids: tokens that end the sequence: allowed exactly where its text may end.
        ignore_eos: they are allowed only where nothing else may follow.
    """

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        compiled: Future[LLMatcher],
        end_ids: frozenset[int],
        *,
        ignore_eos: bool,
    ) -> None:
        self._threads = threads
        self._end_ids = end_ids
        self._ignore_eos = ignore_eos
        self._llmatcher: LLMatcher | None = None
        self._allowed = threads.submit(self._begin, compiled)

    def accept(self, token: int) -> None:
        """Take the newest token, and begin to compute what may follow it.

        Args:
            token: chosen from those that `allowed` returned.
        """
        self._allowed = self._threads.submit(self._advance, token)

    def allowed(self) -> npt.NDArray[np.uint8]:
        """Wait for the allowed tokens.

        Returns:
            [n] uint8 where tokens from n on are not allowed: 0 is not allowed.

        Raises:
            Stuck: none is, or they could not be computed.
        """
        try:
            return np.frombuffer(self._allowed.result(MASK_SECONDS), dtype=np.uint8)
        except TimeoutError as error:
            raise Stuck(f"{CANNOT_GO_ON}: it takes too long to compute") from error
        except ValueError as error:
            raise Stuck(f"{CANNOT_GO_ON}: {error}") from error

    def _begin(self, compiled: Future[LLMatcher]) -> bytearray:
        self._llmatcher = compiled.result().deep_copy()
        return self._compute(self._llmatcher)

    def _advance(self, token: int) -> bytearray:
        matcher = self._llmatcher
        if matcher is None:  # what `_begin` raised ended the sequence
            raise ValueError("it could not begin")
        matcher.consume_token(token)
        return self._compute(matcher)

    def _compute(self, matcher: LLMatcher) -> bytearray:
        """One byte a token, 0 where it is not allowed. Raises ValueError.

        Plain bytes, no tensors: torch would start a second team of OpenMP threads here.
        """
        _raise_fault(matcher)
        allowed = bytearray(matcher.compute_logit_bias())
        _raise_fault(matcher)
        if matcher.is_accepting():
            self._allow_end(allowed)
        if not _allows_any(allowed):
            raise ValueError("no token of this model may follow")
        return allowed

    def _allow_end(self, allowed: bytearray) -> None:
        """Allow the end tokens, where the text may end."""
        known = [token for token in self._end_ids if token < len(allowed)]
        for token in known:
            allowed[token] = 0
        if self._ignore_eos and _allows_any(allowed):
            return
        for token in known:
            allowed[token] = 1


def constrained(logits: Tensor, matchers: Items[Matcher | None]) -> Tensor:
    """Take the tokens that are not allowed from their rows.

    Args:
        logits: [b, vocab] fp32, not changed.
        matchers: one for each row; None allows every token.

    Returns:
        [b, vocab] fp32, -inf where a token is not allowed; `logits` itself if all are.

    Raises:
        Stuck: a row has no token left.
    """
    if not any(matchers):
        return logits
    # In numpy: each operation of torch on a vocabulary wakes a team of threads and waits for it.
    scores = logits.numpy(force=True).copy()
    for row, matcher in zip(scores, matchers, strict=True):
        if matcher is None:
            continue
        allowed = matcher.allowed()[: len(row)]
        row[len(allowed) :] = -np.inf
        row[: len(allowed)][allowed == 0] = -np.inf
        if not np.isfinite(row.max()):
            raise Stuck(f"{CANNOT_GO_ON}: the model rules out every token that may follow")
    return torch.from_numpy(scores).to(logits.device)


class _DeepThreads(ThreadPoolExecutor):
    """Threads with a stack for grammars that nest deep."""

    _spawning = threading.Lock()  # the size of a stack is the whole process's

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submits as usual, which starts a thread if none is idle."""
        with self._spawning:
            previous = threading.stack_size(STACK_BYTES)
            try:
                return super().submit(*args, **kwargs)
            finally:
                threading.stack_size(previous)


def _inert_tokenizer(tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> LLTokenizer:
    """A tokenizer for grammars in which the text of a special token (`<|im_end|>`) is only text.

    llguidance encodes the texts that a grammar asks for. It would take such a text for the token,
    which ends the answer or has no text, so the special tokens have other names there.
    """
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    described: dict[str, Any] = json.loads(backend.to_str())
    secret = secrets.token_hex(16)
    names = {}
    for added in described["added_tokens"]:
        if added["special"]:
            names[added["content"]] = f"<{secret}{added['id']}>"
            added["content"] = names[added["content"]]
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, dict):
        renamed: Any = {names.get(token, token): i for token, i in vocabulary.items()}
    else:  # Unigram: [token, score] by id
        renamed = [[names.get(token, token), score] for token, score in vocabulary]
    described["model"]["vocab"] = renamed
    ends = sorted(end_ids) or tokenizer.eos_token_id
    return LLTokenizer(json.dumps(described), eos_token=ends)


def _grammar(constraint: Constraint) -> str:
    """llguidance's own form of a constraint. Raises ValueError."""
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        return LLMatcher.grammar_from_json_schema({"type": "object", "x-guidance": JSON_STYLE})
    source = constraint.source
    try:
        if constraint.kind is ConstraintKind.JSON_SCHEMA:
            schema = closed(json.loads(source))
            if isinstance(schema, dict):
                schema.setdefault("x-guidance", JSON_STYLE)
            source = json.dumps(schema)  # llguidance pastes it into a larger JSON text
        return grammar_from(_FORMATS[constraint.kind], source)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def _raise_fault(matcher: LLMatcher) -> None:
    """Raises ValueError if a grammar is none, or has met a limit."""
    if not matcher.is_error():
        return
    reason = matcher.get_error().partition("<")[0]
    if reason.startswith("NoExtension"):
        reason = "no text can satisfy it"
    raise ValueError(" ".join(reason.split())[:MAX_REASON])


def _allows_any(allowed: bytearray) -> bool:
    return allowed.count(0) < len(allowed)
