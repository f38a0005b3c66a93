"""What a list says of a job's request; of older jobs it says nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column("jobs", sa.Column("settings", sa.JSON, nullable=False, server_default="{}"))
