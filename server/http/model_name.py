"""What `model` names in OpenAI's requests: a task or the base model, and whether CRMA is on."""

from crma.core.errors import LineageMismatch, NotFound
from server.service.caller import Caller
from server.service.errors import InvalidField, ModelNotFound, NoBackbone
from server.service.frontend import Frontend
from server.service.registry import Resolved

BASE = "base"
SUFFIXES = {"crma-on": True, "crma-off": False}


def resolve_model(model: str, asked: bool | None, frontend: Frontend, caller: Caller) -> Resolved:
    """The adapters of `model` and `crma`.

    Args:
        model: `base` or `name[@version]`; `:crma-on` or `:crma-off` may follow.
        asked: the field `crma`; null: as the suffix, or else as the adapter was trained.

    Raises:
        InvalidField: they contradict each other.
        ModelNotFound: no such task or version for this caller.
    """
    name, _, suffix = model.rpartition(":")
    if suffix not in SUFFIXES:
        name = model
    crma = SUFFIXES.get(suffix, asked)
    if asked is not None and asked != crma:
        message = "crma: contradicts the suffix of model"
        raise InvalidField(message, field="crma", value=asked, allowed=crma)
    try:
        return frontend.resolve(None if name == BASE else name, crma, caller=caller)
    except NotFound as error:
        raise _unknown(name, error) from error
    except (LineageMismatch, NoBackbone) as error:
        if suffix not in SUFFIXES:
            raise
        allowed = [f"{name}:crma-off"]
        raise type(error)(error.message, field="model", value=model, allowed=allowed) from error


def _unknown(name: str, error: NotFound) -> ModelNotFound:
    """The error for a model that is no task or version here: the base model is a model too."""
    names = list(error.allowed) if isinstance(error.allowed, list) else []
    are_versions = any("@" in each for each in names)
    allowed = names if are_versions else [BASE, *names]
    return ModelNotFound(f"no model {name!r}", field="model", value=name, allowed=allowed)
