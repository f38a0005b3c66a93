"""crma.core.errors: errors that cross between processes."""

import copy
import pickle

import pytest

from crma.core.errors import ConfigError, CrmaError, NotFound
from server.engine.errors import PromptTooLong, QueueFull

ERRORS = (
    ConfigError("wrong", field="dtype", value="int7", allowed=("int8",)),
    NotFound("no such task", field="task", value="physics"),
    QueueFull(3, retry_after=2.5),
    PromptTooLong(10, 20, 16),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_crosses_to_another_process_whatever_its_class_is_made_of(
    error: CrmaError,
) -> None:
    """Python makes an exception again from its message alone, which QueueFull does not take."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)
