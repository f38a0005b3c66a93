"""OpenAI's routes, as its clients send and read them.

Refusals have OpenAI's form (`server/http/error_handlers.py`).
"""

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from crma.models.tools import ToolMarkup
from server.http.auth import TheCaller, counts, require_generate
from server.http.dependencies import AfterResponse, TheFrontend
from server.http.error_handlers import GENERATING, documented
from server.http.model_name import resolve_model
from server.http.openai_answer import ChatAnswer, CompletionAnswer
from server.http.openai_schemas import (
    ChatRequest,
    CompletionRequest,
    OpenAIErrorBody,
    OpenAIRequest,
)
from server.http.tool_answer import ToolAnswer
from server.service.caller import Caller
from server.service.errors import InvalidField
from server.service.frontend import Frontend
from server.service.registry import Resolved

router = APIRouter(prefix="/v1", dependencies=[require_generate, counts])

COMPLETION_ERRORS = documented(*GENERATING, body=OpenAIErrorBody, example_of="/v1/completions")
CHAT_ERRORS = documented(*GENERATING, body=OpenAIErrorBody, example_of="/v1/chat/completions")


@router.post("/completions", responses=COMPLETION_ERRORS)
async def completions(
    body: CompletionRequest,
    request: Request,
    frontend: TheFrontend,
    caller: TheCaller,
    after_response: AfterResponse,
) -> Response:
    """OpenAI's legacy completion of raw prompts, in which special tokens are recognised.

    `model` chooses the task adapter and whether CRMA is on. The answer is OpenAI's
    `text_completion`, and `provenance`: what `model` was resolved to, and the seed. With `echo` and
    `logprobs` it has the log-probabilities of the prompt's tokens, as lm-eval asks for them.
    """
    _check_counts(body, frontend)
    resolved = _resolve_body(body, request, frontend, caller)
    sampling = body.sampling(
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        ignore_eos=body.ignore_eos or _scores_prompt(body),
    )
    generations = []
    is_one = len(body.prompt) == 1
    for position, prompt in enumerate(body.prompt):
        generation = await frontend.generation(
            prompt,
            resolved,
            sampling,
            raw=True,
            add_special_tokens=body.add_special_tokens,
            timeout_s=body.timeout_s,
            prefix="cmpl",
            prompt_name="prompt" if is_one else f"prompt.{position}",
        )
        generations.append(generation)
    answer = CompletionAnswer(body, generations, frontend)
    return await answer.respond(request, after_response, stream=body.stream)


@router.post("/chat/completions", responses=CHAT_ERRORS)
async def chat(
    body: ChatRequest,
    request: Request,
    frontend: TheFrontend,
    caller: TheCaller,
    after_response: AfterResponse,
) -> Response:
    """OpenAI's chat completion.

    `model` chooses the task adapter and whether CRMA is on. One user turn to a task goes through
    the prompt format that its adapter was trained with, as in /generate; other conversations go
    through the model's chat template. The content of a message is text, never markup.
    """
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs: needs logprobs"
        raise InvalidField(message, field="top_logprobs", value=body.top_logprobs, allowed=0)
    resolved = _resolve_body(body, request, frontend, caller)
    sampling = body.sampling(logprobs=body.top_logprobs if body.logprobs else None)
    conversation = body.conversation()
    functions = body.shown_functions()
    markup = _tool_markup(body, resolved, frontend) if functions else None
    if markup is not None:
        conversation = markup.conversation(conversation, functions)
        # A call may be marked by special tokens; its grammar allows no others.
        constraint = body.tool_constraint(markup, functions)
        sampling = replace(sampling, constraint=constraint, skip_special_tokens=False)
    generation = await frontend.generation(
        conversation,
        resolved,
        sampling,
        fills_context=body.token_limit is None,
        timeout_s=body.timeout_s,
        prefix="chatcmpl",
    )
    answer = ChatAnswer(body, [generation], frontend)
    if markup is not None:
        answer = ToolAnswer(body, [generation], frontend, markup)
    return await answer.respond(request, after_response, stream=body.stream)


def _tool_markup(body: ChatRequest, resolved: Resolved, frontend: Frontend) -> ToolMarkup:
    """How calls are written.

    Raises:
        InvalidField: a constraint beside tools.
        ConfigError: the chat template writes calls in a form that is not known.
    """
    constraint = body.constraint()
    if constraint is not None:
        message = f"{constraint.field}: with tools the answer is a text or calls"
        allowed = 'no other constraint, or "tool_choice": "none"'
        field = constraint.field
        raise InvalidField(message, field=field, value=constraint.kind, allowed=allowed)
    return frontend.tool_markup(resolved)


def _check_counts(body: CompletionRequest, frontend: Frontend) -> None:
    """Raises for counts that do not fit each other or the server.

    Raises:
        InvalidField: other than n answers of n, or no token where no echo is asked for.
        RequestTooLarge: as `Frontend.check_room`.
    """
    if body.best_of not in (None, body.n):
        message = "best_of: every answer is returned"
        raise InvalidField(message, field="best_of", value=body.best_of, allowed=body.n)
    if body.token_limit == 0 and not body.echo:
        message = "max_tokens: 0 is for echo, which returns the prompt alone"
        raise InvalidField(message, field="max_tokens", value=0, allowed=">= 1, or 0 with echo")
    frontend.check_room(body.n * len(body.prompt), field="prompt")


def _scores_prompt(body: CompletionRequest) -> bool:
    """Whether a request is lm-eval's way to score a prompt: echo it, and generate one token.

    lm-eval cuts that token off, so there must be one even where the model would end its answer.
    """
    return body.echo and body.token_limit == 1


def _resolve_body(
    body: OpenAIRequest, request: Request, frontend: Frontend, caller: Caller
) -> Resolved:
    """The adapters of a body; they are put into the request's state for the log."""
    if body.stream_options.include_usage and not body.stream:
        message = "stream_options: needs stream"
        raise InvalidField(message, field="stream_options", value="include_usage", allowed=None)
    resolved = resolve_model(body.model, body.crma, frontend, caller)
    request.state.selection = resolved.selection
    return resolved
