"""The prompt format that a run trains with: of the configuration's word, or of a template file."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from crma.core.errors import ConfigError
from crma.models.prompts import RAW_FORMAT, Format, chat_format
from crma.training.config import TrainConfig

_ALLOWED = '"chat", "raw", or the file of a chat template'


def format_of(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The format of all prompts of a run.

    Raises:
        ConfigError: "chat" and the base model has no chat template; or no such file; or the
            template does not show the user's text as it is.
    """
    name = config.prompt_format
    if name == "raw":
        return RAW_FORMAT
    template = None if name == "chat" else _read_template(name)
    try:
        return chat_format(tokenizer, template)
    except ConfigError as error:
        message = f'prompt_format {name!r}: {error}; "raw" or the file of a template needs none'
        raise ConfigError(message, field="prompt_format", value=name, allowed=_ALLOWED) from error


def _read_template(name: str) -> str:
    """The text of a template file. Raises ConfigError if it cannot be read."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        message = f"the file {name!r} cannot be read: {reason}"
        raise ConfigError(message, field="prompt_format", value=name, allowed=_ALLOWED) from error
