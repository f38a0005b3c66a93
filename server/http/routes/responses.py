"""POST /v1/responses: OpenAI's newer route for text, without anything that is kept."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.http.auth import TheCaller, counts, require_generate
from server.http.dependencies import AfterResponse, TheFrontend
from server.http.error_handlers import GENERATING, documented
from server.http.model_name import resolve_model
from server.http.openai_schemas import OpenAIErrorBody
from server.http.responses_answer import ResponsesAnswer
from server.http.responses_schemas import LOGPROBS, ResponsesRequest
from server.service.errors import InvalidField

router = APIRouter(prefix="/v1", dependencies=[require_generate, counts])

ANSWERS = documented(*GENERATING, body=OpenAIErrorBody, example_of="/v1/responses")


@router.post("/responses", responses=ANSWERS)
async def responses(
    body: ResponsesRequest,
    request: Request,
    frontend: TheFrontend,
    caller: TheCaller,
    after_response: AfterResponse,
) -> Response:
    """OpenAI's response to a text or a conversation, which the client sends whole each time.

    `model` chooses the task adapter and whether CRMA is on, and prompts are made as in
    /v1/chat/completions. Nothing is stored, so an answer has `store` false. It also has
    `provenance`: what `model` was resolved to, and the seed.
    """
    if body.top_logprobs and not body.wants_logprobs:
        message = f"top_logprobs: needs {LOGPROBS} in include"
        raise InvalidField(message, field="top_logprobs", value=body.top_logprobs, allowed=0)
    if body.stream_options.model_fields_set and not body.stream:
        message = "stream_options: needs stream"
        raise InvalidField(message, field="stream_options", allowed=None)
    resolved = resolve_model(body.model, body.crma, frontend, caller)
    request.state.selection = resolved.selection
    generation = await frontend.generation(
        body.messages(),
        resolved,
        body.sampling(),
        timeout_s=body.timeout_s,
        prefix="resp",
        fills_context=body.max_output_tokens is None,
    )
    answer = ResponsesAnswer(body, [generation], frontend)
    return await answer.respond(request, after_response, stream=body.stream)
