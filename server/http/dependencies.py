"""What routes ask FastAPI for."""

from typing import Annotated

import fastapi
from fastapi import Depends

from server.service.ablation import Ablations
from server.service.frontend import Frontend


def _frontend(request: fastapi.Request) -> Frontend:
    return request.app.state.frontend


def _ablations(request: fastapi.Request) -> Ablations:
    return request.app.state.ablations


TheFrontend = Annotated[Frontend, Depends(_frontend)]
TheAblations = Annotated[Ablations, Depends(_ablations)]
