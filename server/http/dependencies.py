"""What routes ask FastAPI for."""

from typing import Annotated

import fastapi
from fastapi import Depends

from server.service.frontend import Frontend


def _frontend(request: fastapi.Request) -> Frontend:
    return request.app.state.frontend


TheFrontend = Annotated[Frontend, Depends(_frontend)]
