"""What routes ask FastAPI for."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import Depends, Request

from server.service.ablation import Ablations
from server.service.frontend import Frontend


def _frontend(request: Request) -> Frontend:
    return request.app.state.frontend


def _ablations(request: Request) -> Ablations:
    return request.app.state.ablations


async def _exit_stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


TheFrontend = Annotated[Frontend, Depends(_frontend)]
TheAblations = Annotated[Ablations, Depends(_ablations)]

AfterResponse = Annotated[AsyncExitStack, Depends(_exit_stack)]
"""Its callbacks run when the response was sent, failed, or never began."""
