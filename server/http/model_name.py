"""What `model` names in OpenAI's requests: a task or the base model, and whether CRMA is on."""

from crma.core.errors import NotFound
from server.service.errors import InvalidField, ModelNotFound
from server.service.frontend import Frontend
from server.service.registry import Resolved

BASE = "base"
SUFFIXES = {"crma-on": True, "crma-off": False}


def resolve_model(model: str, asked: bool | None, frontend: Frontend) -> Resolved:
    """The adapters of `model` and `crma`.

    Args:
        model: `base` or `name[@version]`; `:crma-on` or `:crma-off` may follow.
        asked: the field `crma`; null: as the suffix, or else as the adapter was trained.

    Raises:
        InvalidField: they contradict each other.
        ModelNotFound: no such task or version.
    """
    name, _, suffix = model.rpartition(":")
    if suffix not in SUFFIXES:
        name = model
    crma = SUFFIXES.get(suffix, asked)
    if asked is not None and asked != crma:
        message = "crma: contradicts the suffix of model"
        raise InvalidField(message, field="crma", value=asked, allowed=crma)
    try:
        return frontend.resolve(None if name == BASE else name, crma)
    except NotFound as error:
        message = f"no model {name!r}"
        raise ModelNotFound(message, field="model", value=name, allowed=error.allowed) from error
