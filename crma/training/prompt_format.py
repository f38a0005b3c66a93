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
    try:
        template = None if name == "chat" else Path(name).read_text(encoding="utf-8")
        return chat_format(tokenizer, template)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        message = f'prompt_format {name!r}: {error}; "raw" or the file of a template needs none'
        raise ConfigError(message, field="prompt_format", value=name, allowed=_ALLOWED) from error
