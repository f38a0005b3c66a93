"""Alembic runs this; `database.migrate` gives it an open transaction."""

from alembic import context

from server.records.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
