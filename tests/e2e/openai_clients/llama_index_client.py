"""llama-index: chat, complete, their streams, and a structured prediction."""

import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

ADDRESS, MODEL = sys.argv[1:]


class Sky(BaseModel):
    """The state of the sky."""

    state: Literal["clear", "cloudy"]


def model(**options: object) -> OpenAILike:
    return OpenAILike(
        model=MODEL,
        api_base=f"{ADDRESS}/v1",
        api_key="none",
        context_window=2048,
        temperature=0,
        max_tokens=60,
        **options,
    )


def main() -> None:
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Is the sky clear?"),
    ]
    chat = model(is_chat_model=True, is_function_calling_model=True)
    answer = chat.chat(messages)
    *_, last = chat.stream_chat(messages)
    assert last.message.content == answer.message.content
    chat.chat([*messages, answer.message, ChatMessage(role="user", content="And now?")])
    found = chat.structured_predict(Sky, PromptTemplate("Is the sky clear?"))
    assert isinstance(found, Sky)
    raw = model(is_chat_model=False)
    text = raw.complete("The sky is").text
    *_, last = raw.stream_complete("The sky is")
    assert last.text == text


main()
