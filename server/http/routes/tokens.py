"""POST /tokenize and /detokenize: vLLM's routes, for clients that count or cut prompts."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter

from server.http.auth import TheCaller, counts, require_generate
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.model_name import resolve_model
from server.http.tokens_schemas import DetokenizeRequest, TokenizeRequest
from server.service.errors import InvalidField

router = APIRouter(dependencies=[require_generate, counts])

STATUSES = (400, 401, 403, 404, 409, 413, 422, 429, 503, 504)


@router.post("/tokenize", responses=documented(*STATUSES, example_of="/tokenize"))
async def tokenize(
    body: TokenizeRequest, frontend: TheFrontend, caller: TheCaller
) -> dict[str, Any]:
    """Encode a prompt or messages exactly as the generating routes of /v1 do.

    `count` is the `prompt_tokens` of such a request. A prompt and its answer have `max_model_len`
    tokens together at most. `token_strs` are the tokenizer's own strings, not texts.
    """
    _check_special_tokens(body)
    resolved = resolve_model(body.model, None, frontend, caller)
    encoder = frontend.encoder
    prompt = body.conversation() if body.prompt is None else body.prompt
    encoded = await encoder.encode(
        prompt,
        resolved.prompt_format,
        raw=body.prompt is not None,
        add_special_tokens=body.add_special_tokens is not False,
        answer=None,
        owner=caller.name,
        deadline=time.monotonic() + frontend.settings.request_timeout_s,
    )
    ids = encoded.prompt_ids
    token_strs = None
    if body.return_token_strs:
        token_strs = await asyncio.to_thread(encoder.token_strs, ids)
    return {
        "count": len(ids),
        "max_model_len": frontend.model.max_model_len,
        "tokens": ids,
        "token_strs": token_strs,
    }


@router.post("/detokenize", responses=documented(*STATUSES, example_of="/detokenize"))
async def detokenize(
    body: DetokenizeRequest, frontend: TheFrontend, caller: TheCaller
) -> dict[str, str]:
    """The text of token ids, special tokens too; part of a character is shown as �."""
    resolve_model(body.model, None, frontend, caller)
    frontend.encoder.check_ids(body.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(frontend.encoder.text, body.tokens)}


def _check_special_tokens(body: TokenizeRequest) -> None:
    """Raises InvalidField for special tokens around messages, which no route here adds."""
    if body.messages is not None and body.add_special_tokens:
        field = "add_special_tokens"
        message = f"{field}: messages have those of the chat template, and no others"
        raise InvalidField(message, field=field, value=True, allowed=False)
