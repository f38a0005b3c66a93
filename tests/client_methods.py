"""The methods of the clients that their users see."""

import inspect
from typing import Any


def public_methods(client_class: type) -> dict[str, Any]:
    """The methods that `help` shows, by name; `aclose` counts as `close`."""
    methods = inspect.getmembers(client_class, inspect.isfunction)
    return {
        "close" if name == "aclose" else name: method
        for name, method in methods
        if not name.startswith("_")
    }
