"""Who may call each route. Written down by hand, so that no route opens or closes by accident.

`tests/server/http/test_access.py` tries every route with every credential, and fails for a route
that is not here. `tests/tables.py` prints it into docs/operations.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute

SCOPES = ("generate", "ablate", "metrics", "admin")
ANY = ("generate", "ablate", "admin")


class Rule(NamedTuple):
    """What a route asks for.

    Args:
        scopes: one of them is needed; empty: no key is.
        counts: requests count against the limits of their key.
        only_if_restricted: no key is needed while every key has all tasks.
        needs_owner: on a server without keys it is for admins only.
    """

    scopes: tuple[str, ...] = ()
    counts: bool = False
    only_if_restricted: bool = False
    needs_owner: bool = False


OPEN = Rule()
GENERATE = Rule(("generate",), counts=True)
KEY = Rule(ANY)
ABLATE = Rule(("ablate",))
ADMIN = Rule(("admin",))

RULES: dict[str, Rule] = {
    "POST /generate": GENERATE,
    "POST /v1/completions": GENERATE,
    "POST /v1/chat/completions": GENERATE,
    "POST /v1/responses": GENERATE,
    "POST /tokenize": GENERATE,
    "POST /detokenize": GENERATE,
    "POST /ablation": Rule(("ablate",), counts=True),
    "GET /ablation": ABLATE,
    "GET /ablation/{id}": ABLATE,
    "GET /ablation/{id}/events": ABLATE,
    "DELETE /ablation/{id}": ABLATE,
    "GET /question_sets": ABLATE,
    "GET /question_sets/{name}": ABLATE,
    "GET /v1/models": KEY,
    "GET /v1/models/{model}": KEY,
    "GET /adapters": KEY,
    "GET /usage": KEY,
    "PUT /question_sets/{name}": Rule(("ablate", "admin"), counts=True, needs_owner=True),
    "DELETE /question_sets/{name}": Rule(("ablate", "admin"), needs_owner=True),
    "GET /adapters/{task}": KEY,
    "GET /backbones": KEY,
    "GET /runs": KEY,
    "GET /runs/{id:path}": KEY,
    "POST /adapters": ADMIN,
    "DELETE /adapters/{task}": ADMIN,
    "POST /adapters/{task}/rollback": ADMIN,
    "POST /adapters/{task}/load": ADMIN,
    "POST /adapters/{task}/unload": ADMIN,
    "POST /adapters/{task}/pin": ADMIN,
    "POST /adapters/{task}/unpin": ADMIN,
    "POST /v1/load_lora_adapter": ADMIN,
    "POST /v1/unload_lora_adapter": ADMIN,
    "POST /backbones/{version}/promote": ADMIN,
    "GET /backbones/promotion": ADMIN,
    "DELETE /backbones/promotion": ADMIN,
    "POST /backbones/rollback": ADMIN,
    "GET /audit": ADMIN,
    "GET /metrics": Rule(("metrics", "admin"), only_if_restricted=True),
    "GET /healthz": OPEN,
    "GET /readyz": OPEN,
    "GET /health": OPEN,
    "GET /ping": OPEN,
    "POST /ping": OPEN,
    "GET /version": OPEN,
    "GET /": OPEN,
    "GET /page/{path:path}": OPEN,
    "GET /docs": OPEN,
    "GET /docs/oauth2-redirect": OPEN,
    "GET /openapi.json": OPEN,
    "GET /static-offline-docs": OPEN,
}


def named(routes: Sequence[BaseRoute]) -> set[str]:
    """The routes of an app as RULES names them: "METHOD /path"; HEAD is a part of GET."""
    found = set()
    for route in iter_route_contexts(routes):
        methods = route.methods or {"GET"}  # a folder of files has none
        found |= {f"{method} {route.path}" for method in methods - {"HEAD"}}
    return found


def rows() -> list[list[str]]:
    """The table of the documents: each route, and what each caller gets."""
    table = []
    for route, rule in RULES.items():
        cells = [_answer(rule, None), *(_answer(rule, scope) for scope in SCOPES)]
        table.append([f"`{route}`", *cells, "yes" if rule.counts else ""])
    return table


def _answer(rule: Rule, scope: str | None) -> str:
    """What a key with one scope gets; None: no key or an unknown one, on a server with keys."""
    if not rule.scopes or scope in rule.scopes:
        return "✓"
    refused = "401" if scope is None else "403"
    return f"✓ or {refused}" if rule.only_if_restricted else refused
