"""`Client`: every call blocks until its answer is there."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.chats import ChatReader
from crma_client.connection import Connection
from crma_client.errors import ConnectionFailed, CrmaClientError
from crma_client.job_events import POLL_S, ProgressReader
from crma_client.streams import TokenReader, TokenStream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import date
    from os import PathLike

    from typing_extensions import Unpack

    from crma_client.calls import ChatOptions, GenerateOptions
    from crma_client.chats import Chat
    from crma_client.job_events import OnProgress
    from crma_client.types import Generation

DEFAULT_URL = "http://127.0.0.1:8000"


class Client(Connection):
    """A blocking client of one CRMA Server.

    Use it as a context manager, or call `close()`. Threads may share it. Every method raises a
    class of `crma_client.errors` and nothing else.
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
        """Prepare a client; it connects at the first request.

        Args:
            base_url: the address of the server.
            api_key: sent as a bearer token.
            timeout: seconds to wait for a connection and for each part of an answer: the next token
                of a stream, or else the whole answer. None waits for ever, but no longer than 10 s
                for a connection.
            retries: most attempts after the first. Only what cannot have run is sent again (there
                was no connection, or the server was full or not ready), and what only reads, after
                any failure but a time-out. Waits grow, differ at random, and are never shorter than
                Retry-After.
            http: further arguments of `httpx.Client`, such as verify, proxy or transport.

        Raises:
            InvalidArgument: `base_url` is not a URL, or a header cannot carry `api_key`.
        """
        super().__init__(base_url, api_key, timeout, retries, **http)

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer to a prompt and wait for all of it.

        Args:
            prompt: the question; the server puts it into the prompt format of the task.
            task: a task adapter, as `name` or `name@version`. Default: the base model.
            crma: whether to use the CRMA backbone. Default: on exactly if the task adapter was
                trained with CRMA.
            raw: send the prompt to the model as it is, without the task's prompt format.
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

    def ablation(self, **body: Any) -> dict[str, Any]:
        """Compare variants on a question set and wait for the report, for at most `timeout`.

        The server judges the arguments, which are the fields of POST /ablation.

        Args:
            question_set: name of a set on the server. Give either this or `questions`.
            questions: objects with id, task, question, answers (each of them is right) and,
                optionally, choices.
            tasks: ask only the questions of these tasks.
            variants: base, task, crma or task+crma; versions are named as task@v2+crma@v1.
            scorer: how an answer is compared with the right ones.
            tolerance: largest absolute error that the scorer `numeric` accepts.
            relative_tolerance: largest relative error that it accepts.
            max_tokens: length limit of each answer.
            temperature: 0 is greedy.
            seed: seed of the bootstrap and, unless temperature is 0, of the sampling.
            margin: difference in accuracy within which two variants count as equivalent.
            repeat: run each variant separately, even those that resolve to the same adapters.
            choices: texts, one of which every answer has to be; "own": those of its question.
            timeout_s: deadline of each question, in seconds.
            background: return at once with the id of a job, which `ablation_job` takes.
            provenance: the provenance of an earlier report; the server answers 409 (Conflict) if
                anything in it has changed since.

        Returns:
            The report, or the started job, as the server sent it.
        """
        response = self._send("POST", "/ablation", calls.write_body(body))
        return calls.read_object(response)

    def ablation_jobs(self) -> list[Any]:
        """List the background jobs of your key, newest first, without requests and results."""
        response = self._send("GET", "/ablation")
        return calls.read_list(response)

    def run_ablation(self, on_progress: OnProgress | None = None, **body: Any) -> dict[str, Any]:
        """Run an ablation as a background job, and wait for its report however long it takes.

        Args:
            on_progress: called with (done, total) at the start and whenever something is done.
            body: the arguments of `ablation`, without background.

        Returns:
            The report.

        Raises:
            JobFailed: the job failed, or somebody cancelled it.
            ConnectionFailed: the connection was lost for longer than the retries. The job goes on:
                `wait_for_ablation` takes its id, which is the `value` of the error.

        Any other exception, such as Ctrl-C or one of `on_progress`, cancels the job.
        """
        id = str(self.ablation(**{**body, "background": True})["id"])
        try:
            return self.wait_for_ablation(id, on_progress)
        except CrmaClientError as error:
            error.value = error.value or id
            raise
        except BaseException:
            with suppress(CrmaClientError):
                self.cancel_ablation(id)
            raise

    def wait_for_ablation(self, id: str, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Wait for the report of a background job; see `run_ablation`."""
        while True:
            # After a lost connection the job is asked for, which may raise.
            with suppress(ConnectionFailed), closing(self._progress(id)) as progress:
                for done, total in progress:
                    if on_progress is not None:
                        on_progress(done, total)
            result = calls.job_result(self.ablation_job(id))
            if result is not None:
                return result
            time.sleep(POLL_S)

    def _progress(self, id: str) -> Generator[tuple[int, int]]:
        """Yield (done, total) of a job until its events end."""
        reader = ProgressReader()
        with self._opened("GET", calls.events_path(id)) as response, calls.transport_errors():
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)

    def ablation_job(self, id: str) -> dict[str, Any]:
        """Get the status, progress and request of a background job and, once done, its result."""
        response = self._send("GET", calls.ablation_path(id))
        return calls.read_object(response)

    def cancel_ablation(self, id: str) -> dict[str, Any]:
        """Cancel a background job if it is still running; its record stays."""
        response = self._send("DELETE", calls.ablation_path(id))
        return calls.read_object(response)

    def question_sets(self) -> list[Any]:
        """List name, digest, number of items and source of the question sets that you may ask."""
        response = self._send("GET", "/question_sets")
        return calls.read_list(response)

    def upload_question_set(self, name: str, lines: bytes) -> dict[str, Any]:
        """Store a question set, given as JSON Lines, for your key; an admin's is for every key."""
        response = self._send("PUT", calls.question_set_path(name), lines)
        return calls.read_object(response)

    def delete_question_set(self, name: str) -> dict[str, Any]:
        """Delete a question set that you uploaded."""
        response = self._send("DELETE", calls.question_set_path(name))
        return calls.read_object(response)

    def adapters(self) -> dict[str, Any]:
        """List the base model, the CRMA backbone and the task adapters that the server serves."""
        response = self._send("GET", "/adapters")
        return calls.read_object(response)

    def upload_adapter(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        licence: str | None = None,
        trust_base: bool = False,
        prompt_format: str | None = None,
    ) -> dict[str, Any]:
        """Publish a PEFT LoRA on the server as the next version of a task. Needs the admin key.

        Args:
            name: of the task, which serves this version from now on.
            folder: holds adapter_config.json and adapter_model.safetensors; the tokenizer's files
                in it are sent too.
            licence: of the adapter, such as Apache-2.0, if you know it.
            trust_base: publish it even if its config names another base model.
            prompt_format: raw, chat or template. None: the adapter's own template if it has one,
                else that of the base model, else raw.

        Returns:
            The version, as `adapters` lists it.

        Raises:
            InvalidArgument: a file of the folder cannot be opened.
        """
        trusted = "true" if trust_base else None
        fields = {"name": name, "licence": licence, "trust_base": trusted}
        fields["prompt_format"] = prompt_format
        with calls.upload_form(folder, fields) as form:
            response = self._send("POST", "/adapters", **form)
        return calls.read_object(response)

    def delete_adapter(self, task: str) -> dict[str, Any]:
        """Delete a version, `name@version`, or all of a task that no longer serves. Needs the admin
        key.
        """
        response = self._send("DELETE", calls.adapter_path(task))
        return calls.read_object(response)

    def tokenize(self, prompt: str | None = None, **body: Any) -> dict[str, Any]:
        """Encode a prompt, or with `messages=[…]` a conversation, as the server would to answer it.

        Args:
            prompt: a raw prompt, which no prompt format changes.
            body: further fields of POST /tokenize, such as model and messages.

        Returns:
            Its tokens, their count, and max_model_len, as the server sent them.
        """
        content = calls.write_body({"prompt": prompt, **body})
        response = self._send("POST", "/tokenize", content=content)
        return calls.read_object(response)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        content = calls.write_body({"tokens": list(tokens)})
        response = self._send("POST", "/detokenize", content=content)
        return str(calls.read_object(response)["prompt"])

    def usage(
        self,
        first_day: date | str | None = None,
        last_day: date | str | None = None,
        *,
        key: str | None = None,
        task: str | None = None,
        by: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Sum up the tokens that this key has used, by day; with the admin key, those of all keys.

        Args:
            first_day: such as 2026-11-27, in UTC. None: 29 days before the last.
            last_day: None: today.
            key: only that of the key of this name.
            task: only that of this task; base: the base model without one.
            by: a sum for each of these: day, key, task, task_digest, crma. None: of all of them.

        Returns:
            from, to and usage, as the server sent them.
        """
        days = {"from": first_day, "to": last_day}
        path = calls.query_path("/usage", {**days, "key": key, "task": task, "by": by})
        response = self._send("GET", path)
        return calls.read_object(response)

    def audit(
        self,
        *,
        limit: int | None = None,
        before: int | None = None,
        who: str | None = None,
        what: str | None = None,
    ) -> list[Any]:
        """List what administrators did, the newest first. Needs the admin key.

        Args:
            limit: at most so many; the server gives 100 by default, and 1000 at most.
            before: the `id` of an act: only earlier ones.
            who: only acts of the key of this name.
            what: only this act, such as publish.
        """
        fields = {"limit": limit, "before": before, "who": who, "what": what}
        response = self._send("GET", calls.query_path("/audit", fields))
        return calls.read_list(response)

    def health(self) -> bool:
        """Whether the server process is alive."""
        response = self._send("GET", "/healthz", accepted=[503])
        return calls.read_probe(response)

    def ready(self) -> bool:
        """Whether the server accepts requests: False while it starts or drains."""
        response = self._send("GET", "/readyz", accepted=[503])
        return calls.read_probe(response)

    def metrics(self) -> str:
        """Get the server's metrics in the Prometheus text format."""
        response = self._send("GET", "/metrics")
        return calls.read_text(response)
