"""The acts of administrators, and the tokens that keys have used by day."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables."""
    _audit()
    _usage()


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("who", sa.String(256), nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("what", sa.String(64), nullable=False),
        sa.Column("object", sa.JSON),
        sa.Column("version", sa.Text),
        sa.Column("digest", sa.String(80)),
        sa.Column("result", sa.String(64), nullable=False),
        sa.Column("reason", sa.JSON),
        sa.Column("request_id", sa.String(64)),
    )
    op.create_index("audit_by_time", "audit", ["time"])


def _usage() -> None:
    op.create_table(
        "usage",
        sa.Column("day", sa.String(10)),
        sa.Column("key", sa.String(256)),
        sa.Column("task", sa.String(64)),
        sa.Column("task_digest", sa.String(80)),
        sa.Column("crma", sa.Boolean),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("day", "key", "task", "task_digest", "crma"),
    )
    op.create_table(
        "usage_writers",
        sa.Column("server", sa.String(32), primary_key=True),
        sa.Column("num_writes", sa.BigInteger, nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
    )
