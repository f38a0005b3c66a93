"""The server: HTTP in `routes`, the engine in `engine`, the method in `crma`."""

__version__ = "0.1.0"
