"""Which prompt a conversation makes, in every route that takes messages."""

from crma.models.prompts import Conversation
from server.service.errors import InvalidField
from server.service.prompt_encoder import Prompt
from server.service.registry import Resolved


def prompt_of(conversation: Conversation, resolved: Resolved) -> Prompt:
    """One user turn to a task as text, for its adapter's format; else the conversation.

    Raises InvalidField for variables of a template where no template is used.
    """
    turns = conversation.turns
    has_format = resolved.task is not None and resolved.task.prompt_format is not None
    is_one_question = len(turns) == 1 and turns[0].role == "user"
    if not (has_format and is_one_question):
        return conversation
    if conversation.template_kwargs:
        field = "chat_template_kwargs"
        message = f"{field}: one user turn to this task goes through its adapter's own format"
        value = dict(conversation.template_kwargs)
        raise InvalidField(message, field=field, value=value, allowed={})
    return turns[0].content or ""
